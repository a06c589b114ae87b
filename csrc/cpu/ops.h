// The ops of the wide path as functions, for the ops that are made of them; see reference.py.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace moelora {

// h, u, weights, indices, logits.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shrink_gate(
    Tensor x, std::vector<Tensor> lora_a, std::optional<Tensor> gates,
    std::optional<Tensor> indices, std::optional<Tensor> rows_of_tokens,
    std::vector<Tensor> router_weight, std::vector<Tensor> router_bias, std::vector<int64_t> ranks,
    std::vector<double> scaling, bool share_a, int64_t top_k, bool renormalize, double temperature,
    double dropout_p, bool dropout_per_expert, std::optional<Tensor> seed);

// dh, u, and the gradient of the gates or, with top_k > 0, of the logits.
std::tuple<Tensor, Tensor, Tensor> shrink_gate_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h, Tensor gates,
    std::optional<Tensor> indices, std::optional<Tensor> rows_of_tokens,
    std::optional<Tensor> logits, std::optional<Tensor> dlogits, std::vector<int64_t> ranks,
    std::vector<double> scaling, bool share_a, int64_t top_k, bool renormalize, double temperature);

// dropout(dh A) + dlogits Wr.
Tensor shrink_dx(Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> lora_a,
                 std::vector<Tensor> router_weight, std::vector<int64_t> ranks, double dropout_p,
                 bool dropout_per_expert, std::optional<Tensor> seed);

// dA, dWr, dbr and the list of dB.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> gram(
    Tensor x, Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> dy, Tensor u,
    ScalarType lora_dtype, ScalarType router_dtype, std::vector<int64_t> ranks, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed);

}  // namespace moelora
