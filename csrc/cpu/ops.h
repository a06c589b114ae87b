// The ops as functions, for the ops that call them. moelora_kernels/ops documents each op, and the
// arguments have the order of its schema.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace moelora {

// Returns h, u, and the weights, experts and logits of the routers' gate.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shrink_gate(
    Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> router_weight,
    std::vector<Tensor> router_bias, std::optional<Tensor> gate_weights,
    std::optional<Tensor> experts, std::optional<Tensor> rows, std::optional<Tensor> logits,
    std::vector<int64_t> ranks, std::vector<double> scaling, bool share_a, int64_t top_k,
    bool renormalize, double temperature, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed);

// Returns dh, u, and dgate: the gradient of the gate's weights, or of the logits with top_k > 0.
std::tuple<Tensor, Tensor, Tensor> shrink_gate_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h,
    std::optional<Tensor> gate_weights, std::optional<Tensor> experts, std::optional<Tensor> rows,
    std::optional<Tensor> logits, std::optional<Tensor> dlogits, std::vector<int64_t> ranks,
    std::vector<double> scaling, bool share_a, int64_t top_k, bool renormalize, double temperature);

// Returns dropout(dh A) + dlogits Wr, [T, I].
Tensor shrink_dx(Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> lora_a,
                 std::vector<Tensor> router_weight, std::vector<int64_t> ranks, double dropout_p,
                 bool dropout_per_expert, std::optional<Tensor> seed);

// Returns dA, dWr, dbr and n x dB.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> weight_grad(
    Tensor x, Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> dy, Tensor u,
    std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed, ScalarType lora_dtype, ScalarType router_dtype);

// Returns weights and experts, [N, K] each.
std::tuple<Tensor, Tensor> topk_gate(Tensor logits, int64_t top_k, bool renormalize,
                                     double temperature);

// Returns dlogits [N, E].
Tensor topk_gate_backward(Tensor dweights, Tensor weights, Tensor experts, Tensor logits,
                          bool renormalize, double temperature);

// Returns logits [T, n E].
Tensor router_logits(Tensor x, std::vector<Tensor> router_weight, std::vector<Tensor> router_bias);

// Returns dWr [n E, I] and dbr [n E].
std::tuple<Tensor, Tensor> router_grad(Tensor dlogits, Tensor x, ScalarType router_dtype);

// Returns dWr and dbr from dlogits [P] of the pairs, if the dlogits of all other experts are zero.
std::tuple<Tensor, Tensor> grouped_router_grad(Tensor dlogits, Tensor x, Tensor order,
                                               Tensor offsets, ScalarType router_dtype);

// Returns h and u, [P, largest rank] each.
std::tuple<Tensor, Tensor> grouped_shrink(Tensor x, std::vector<Tensor> lora_a,
                                          std::optional<Tensor> weights, Tensor order,
                                          Tensor offsets, Tensor tiles, Tensor chunks,
                                          std::vector<int64_t> ranks, std::vector<double> scaling,
                                          double dropout_p, bool dropout_per_expert,
                                          std::optional<Tensor> seed);

// Returns dh and u [P, largest rank], and dweights [T, S].
std::tuple<Tensor, Tensor, Tensor> grouped_shrink_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h, std::optional<Tensor> weights,
    Tensor order, Tensor offsets, Tensor tiles, Tensor chunks, std::vector<int64_t> ranks,
    std::vector<double> scaling);

// Returns y [T, O] = start + the terms of every token; or a row for every pair with per_pair.
Tensor grouped_expand(Tensor u, std::vector<Tensor> matrices, std::optional<Tensor> start,
                      Tensor order, Tensor offsets, Tensor tiles, Tensor chunks,
                      std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
                      std::optional<Tensor> seed, int64_t tokens, int64_t first_sibling,
                      bool per_pair);

// Returns dx [T, I]: grouped_expand of dh and A, and dlogits Wr.
Tensor grouped_dx(Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> lora_a,
                  std::vector<Tensor> router_weight, Tensor order, Tensor offsets, Tensor tiles,
                  Tensor chunks, std::vector<int64_t> ranks, double dropout_p,
                  bool dropout_per_expert, std::optional<Tensor> seed, int64_t tokens,
                  bool sparse_dlogits);

// The arguments of `grouped_expand_in_place`.
struct ExpandArguments {
  Tensor u;
  std::vector<Tensor> matrices;
  Tensor order;
  Tensor offsets;
  std::vector<int64_t> ranks;
  int64_t first_sibling = 0;
  double dropout_p = 0.0;
  bool dropout_per_expert = false;
  std::optional<Tensor> seed = std::nullopt;
  // With coefficients [P], each pair also adds its coefficient times the row of its expert in
  // expert_rows [n E, O]. Dropout does not reach that term.
  std::optional<Tensor> coefficients = std::nullopt;
  std::optional<Tensor> expert_rows = std::nullopt;
};

// Adds the terms of `grouped_expand` to y [T, O], which has u's dtype.
void grouped_expand_in_place(const Tensor& y, const ExpandArguments& arguments);

// Returns dA [n R, I] and n x dB [O, R]; zeros for the experts in `frozen`.
std::tuple<Tensor, std::vector<Tensor>> grouped_weight_grad(
    Tensor x, Tensor dh, std::vector<Tensor> dy, Tensor u, Tensor order, Tensor offsets,
    Tensor tiles, Tensor chunks, std::vector<int64_t> ranks, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, ScalarType lora_dtype,
    std::vector<int64_t> frozen);

}  // namespace moelora
