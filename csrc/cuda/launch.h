// What the choosers `choose_<op>_<pass>` read and return: plain numbers, so that they are tested without a GPU.
#pragma once

#include <cstdint>

namespace cotnet {

// The numbers of one GPU that choices depend on.
struct DeviceNumbers {
  int sm_count;
  int arch;          // compute capability times 10: 75 for Turing, 80 and 86 for Ampere, 90 for Hopper
  int shared_bytes;  // largest shared memory of one block, by opt-in
};

// Shape of a launch. The x axis of the grid may have 2^31 - 1 blocks, the others 65535.
struct Launch {
  unsigned grid_x = 1;
  unsigned grid_y = 1;
  unsigned grid_z = 1;
  unsigned threads = 1;  // of a block, along x
  unsigned shared_bytes = 0;

  bool empty() const { return grid_x == 0 || grid_y == 0 || grid_z == 0; }
};

}  // namespace cotnet
