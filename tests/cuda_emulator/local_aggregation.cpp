// Binds csrc/cuda/local_aggregation.cuh.
#include "cuda/local_aggregation.cuh"

#include "bindings.h"

COTNET_BINDINGS(m) {
  using namespace cotnet;
  using namespace cotnet::bindings;
  m.def("local_aggregation", [](const std::string& dtype, const py::tuple& problem, const py::tuple& device,
                                const py::object& x, const py::object& w, const py::object& y) {
    dispatch_dtype(dtype, [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      local_aggregation_forward(aggregation_problem(problem), in<scalar_t>(x), in<scalar_t>(w), out<scalar_t>(y),
                                device_numbers(device), Stream{});
    });
  });
  m.def("local_aggregation_backward", [](const std::string& dtype, const py::tuple& problem, const py::tuple& device,
                                         const py::object& grad_y, const py::object& x, const py::object& w,
                                         const py::object& grad_x, const py::object& grad_w) {
    dispatch_dtype(dtype, [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      local_aggregation_backward(aggregation_problem(problem), in<scalar_t>(grad_y), in<scalar_t>(x), in<scalar_t>(w),
                                 out<scalar_t>(grad_x), out<scalar_t>(grad_w), device_numbers(device), Stream{});
    });
  });
  // (columns, rows, rows at once, column tiles, strips, slabs, threads, blocks, bytes of shared memory), or None.
  m.def("choose_aggregation_image", [](const py::tuple& problem, int element_bytes, bool aligned, bool backward, bool norm,
                                       const py::tuple& device) -> py::object {
    ImageNeeds needs;
    needs.grad_x = needs.grad_w = backward;
    needs.norm = norm;
    const ImageTile t =
        choose_aggregation_image(aggregation_problem(problem), element_bytes, aligned, needs, device_numbers(device));
    if (!t.possible()) return py::none();
    return py::make_tuple(t.columns, t.rows, t.step, t.column_tiles, t.strips, t.slabs, t.launch.threads, t.launch.grid_x,
                          t.launch.shared_bytes);
  });
  // (vectors of a pixel, threads that share one, threads with work, blocks) for the output or the gradient of the input, or of
  // the weights, or None.
  m.def("choose_aggregation_pixels", [](const py::tuple& problem, int element_bytes, bool aligned,
                                        const std::string& result) -> py::object {
    const AggregationProblem p = aggregation_problem(problem);
    const Pixels pixels = result == "grad_weight" ? choose_aggregation_pixels_grad_weight(p, element_bytes, aligned)
                                                  : choose_aggregation_pixels(p, element_bytes, aligned, result == "grad_input");
    if (!pixels.possible()) return py::none();
    return py::make_tuple(pixels.vectors, pixels.shares, pixels.threads, pixels.launch.grid_x);
  });
  // (vectors of a row, vectors of a plane, threads with work, blocks), or None.
  m.def("choose_aggregation_direct", [](const py::tuple& problem, int element_bytes, bool aligned) -> py::object {
    const Direct direct =
        choose_aggregation_direct(aggregation_problem(problem), element_bytes, 16 / element_bytes, aligned);
    if (!direct.possible()) return py::none();
    return py::make_tuple(direct.row_vectors, direct.plane_vectors, direct.threads, direct.launch.grid_x);
  });
  // (planes, rows, strips, threads, bytes of shared memory) of a block and whether its runs move whole, for the output or the
  // gradient of the input, or of weights that are transformed, or None.
  m.def("choose_aggregation_tile", [](const py::tuple& problem, int element_bytes, bool aligned, const std::string& result,
                                      const py::tuple& device) -> py::object {
    const TileNeeds needs{true, result == "grad_input", result == "grad_weight"};
    const Tile tile =
        choose_aggregation_tile(aggregation_problem(problem), element_bytes, aligned, needs, device_numbers(device));
    if (!tile.possible()) return py::none();
    return py::make_tuple(tile.planes, tile.rows, tile.strips, tile.launch.threads, tile.launch.shared_bytes, tile.bulk);
  });
  // (planes, rows, strips, threads, bytes, turns) for both gradients of plain, softmax or norm weights, or for norm's sums.
  m.def("choose_aggregation_tile_backward", [](const py::tuple& problem, int element_bytes, bool aligned,
                                               const std::string& kind, const py::tuple& device) -> py::object {
    const BackwardNeeds needs = kind == "softmax" ? softmax_backward_needs()
                                : kind == "plain" ? BackwardNeeds{}
                                                  : norm_backward_needs(kind == "norm");
    const BackwardTile tile = choose_aggregation_tile_backward(aggregation_problem(problem), element_bytes, aligned, needs,
                                                               device_numbers(device));
    if (!tile.possible()) return py::none();
    return py::make_tuple(tile.planes, tile.rows, tile.strips, tile.launch.threads, tile.launch.shared_bytes, tile.turns);
  });
}
