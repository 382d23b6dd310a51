// What torch's stable interface lacks or does wrong. Meant to shrink.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

// Older torch has it under this name only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace cotnet {

// A `str` argument of an operator. Torch's own conversion to std::string (2.10 to 2.13) forgets to free a copy on every
// call; an unknown 8-byte type arrives as the bare handle.
struct StringArgument {
  StringHandle handle;
};

// The text; to be called once, as it frees the handle.
inline std::string take(StringArgument argument) {
  const char* text = nullptr;
  size_t length = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument.handle, &text));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(argument.handle, &length));
  const std::string copy(text, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(argument.handle));
  return copy;
}

}  // namespace cotnet
