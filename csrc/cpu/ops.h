// Ops as functions, for the ops that are made of them; see moelora_kernels/reference.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace moelora {

// h, u, weights, experts, logits.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shrink_gate(
    Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> router_weight,
    std::vector<Tensor> router_bias, std::optional<Tensor> gate_weights,
    std::optional<Tensor> experts, std::optional<Tensor> rows, std::optional<Tensor> logits,
    std::vector<int64_t> ranks, std::vector<double> scaling, bool share_a, int64_t top_k,
    bool renormalize, double temperature, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed);

// dh, u, and the gradient of the gates or, with top_k > 0, of the logits.
std::tuple<Tensor, Tensor, Tensor> shrink_gate_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h,
    std::optional<Tensor> gate_weights, std::optional<Tensor> experts, std::optional<Tensor> rows,
    std::optional<Tensor> logits, std::optional<Tensor> dlogits, std::vector<int64_t> ranks,
    std::vector<double> scaling, bool share_a, int64_t top_k, bool renormalize, double temperature);

// dropout(dh A) + dlogits Wr.
Tensor shrink_dx(Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> lora_a,
                 std::vector<Tensor> router_weight, std::vector<int64_t> ranks, double dropout_p,
                 bool dropout_per_expert, std::optional<Tensor> seed);

// dA, dWr, dbr and the list of dB.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> weight_grad(
    Tensor x, Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> dy, Tensor u,
    std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed, ScalarType lora_dtype, ScalarType router_dtype);

// weights, indices.
std::tuple<Tensor, Tensor> topk_gate(Tensor logits, int64_t top_k, bool renormalize,
                                     double temperature);

// dlogits.
Tensor topk_gate_backward(Tensor dweights, Tensor weights, Tensor indices, Tensor logits,
                          bool renormalize, double temperature);

Tensor router_logits(Tensor x, std::vector<Tensor> router_weight, std::vector<Tensor> router_bias);

// dWr, dbr.
std::tuple<Tensor, Tensor> router_grad(Tensor dlogits, Tensor x, ScalarType router_dtype);

// The same where each token's gradient is zero but for the experts of its pairs: dlogits [pairs].
std::tuple<Tensor, Tensor> grouped_router_grad(Tensor dlogits, Tensor x, Tensor order,
                                               Tensor offsets, ScalarType router_dtype);

// h, u.
std::tuple<Tensor, Tensor> grouped_shrink(Tensor x, std::vector<Tensor> lora_a,
                                          std::optional<Tensor> weights, Tensor order,
                                          Tensor offsets, Tensor tiles, Tensor chunks,
                                          std::vector<int64_t> ranks, std::vector<double> scaling,
                                          double dropout_p, bool dropout_per_expert,
                                          std::optional<Tensor> seed);

// dh, u, dweights.
std::tuple<Tensor, Tensor, Tensor> grouped_shrink_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h, std::optional<Tensor> weights,
    Tensor order, Tensor offsets, Tensor tiles, Tensor chunks, std::vector<int64_t> ranks,
    std::vector<double> scaling);

// y [T, O] += the terms of every token, in place; where given, coefficients [pairs] times the row
// of the pair's expert in expert_rows [n E, O] too, which no dropout masks.
void grouped_expand_in_place(const Tensor& y, Tensor u, std::vector<Tensor> matrices, Tensor order,
                             Tensor offsets, std::vector<int64_t> ranks, int64_t first,
                             double dropout_p, bool dropout_per_expert, std::optional<Tensor> seed,
                             std::optional<Tensor> coefficients, std::optional<Tensor> expert_rows);

// y [T, O] = start and the terms of every token, or a row for every pair.
Tensor grouped_expand(Tensor u, std::vector<Tensor> matrices, std::optional<Tensor> start,
                      Tensor order, Tensor offsets, Tensor tiles, Tensor chunks,
                      std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
                      std::optional<Tensor> seed, int64_t tokens, int64_t first_sibling,
                      bool per_pair);

// dA and the list of dB.
std::tuple<Tensor, std::vector<Tensor>> grouped_weight_grad(
    Tensor x, Tensor dh, std::vector<Tensor> dy, Tensor u, Tensor order, Tensor offsets,
    Tensor tiles, Tensor chunks, std::vector<int64_t> ranks, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, ScalarType lora_dtype);

}  // namespace moelora
