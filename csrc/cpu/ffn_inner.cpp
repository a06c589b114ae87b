// The op `ffn_inner`: whole-FFN experts between their frozen products, without a tensor of [P, F].
//     z = gate_out_t + u_gate Bgt        a = act(z) (up_out_t + u_up But)
//     summed_t = sum_k w_tk a_tk         h = dropout(a) Adt        u = scale w h
// ffn_inner.h describes how threads and steps split the work.
#include "ffn_inner.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops.h"

namespace moelora {
namespace {

template <class S, class C>
struct InnerForward {
  const Inner<S, C>& inner;
  const Tensor& summed;
  C* h_sums;  // [ranges, num_routed, padded(width)]

  // Scratch space of a thread, in numbers of C.
  int64_t scratch_size() const {
    return 3 * inner.ranks * STRIP + inner.token_blocks.size() * STRIP + 4 * CHUNK * STRIP +
           CHUNK * (inner.tensors.width + padded(inner.tensors.width));
  }

  // Computes a of a chunk from gate = u_gate Bgt and up = u_up But [CHUNK, STRIP]. Adds w a to the
  // rows of `sums`, and writes dropout(a) to `values`.
  template <class P, class V>
  MOELORA_INLINE void activate_chunk(const Chunk& chunk, int64_t strip, int64_t first_token,
                                     C* gate, const C* up, C* sums, V* values) const {
    const int64_t count = inner.columns(strip);
    for (int64_t n = 0; n < chunk.size(); ++n) {
      const int64_t pair = inner.pair(chunk.begin + n), token = pair / inner.tensors.K;
      const C weight = inner.weights[pair];
      const S* gate_out = inner.row(inner.tensors.gate_out, token, strip);
      const S* up_out = inner.row(inner.tensors.up_out, token, strip);
      C* a = gate + n * STRIP;
      const C* up_row = up + n * STRIP;
      C* sum = sums + (token - first_token) * STRIP;
      for_activation(inner.activation, [&](auto activation) MOELORA_INLINE_LAMBDA {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const C z = C(widen(gate_out[j])) + a[j];
          a[j] = activate<activation()>(z).value * (C(widen(up_out[j])) + up_row[j]);
        }
      });
      if (weight != 0) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) sum[j] += weight * a[j];
      }
      if (inner.mask.active()) {
        inner.mask.apply(a, pair, strip * STRIP, inner.tensors.F, count, chunk.expert);
      }
      V* value_row = values + n * STRIP;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) value_row[j] = Inner<S, C>::template rounded<P>(a[j]);
      std::fill(value_row + count, value_row + STRIP, V(0.0f));
    }
  }

  template <class Level>
  MOELORA_INLINE void run_range(int64_t range, const Ranges& ranges, C* scratch) const {
    using P = Operand<S, Level::bf16_pairs>;
    using Unit = typename P::Unit;
    using V = typename Inner<S, C>::template Value<P>;
    const InnerTensors& t = inner.tensors;
    const TokenBlocks& blocks = inner.token_blocks;
    const int64_t w = padded(t.width);
    const Tensor* const us[] = {&t.u_gate, &t.u_up};
    auto* packed_gate = reinterpret_cast<Unit*>(scratch);  // of gate and up
    Unit* packed_down = packed_gate + 2 * inner.ranks * STRIP;
    Unit* u_units = packed_down + inner.ranks * STRIP;
    C* product = reinterpret_cast<C*>(u_units + CHUNK * t.width);
    C* gate = product + CHUNK * w;  // and up
    C* partial = gate + 2 * CHUNK * STRIP;
    auto* values = reinterpret_cast<V*>(partial + CHUNK * STRIP);
    C* sums = partial + 2 * CHUNK * STRIP;
    C* range_sums = h_sums + range * blocks.num_routed() * w;

    const int64_t first_strip = ranges.first_strip(range),
                  end_strip = ranges.first_strip(range + 1);
    for (int64_t strip = first_strip; strip < end_strip; ++strip) {
      for (int64_t i = 0; i < 2; ++i) {
        inner.template pack_expand<P>(i == 0 ? t.gate_b : t.up_b, strip,
                                      packed_gate + i * inner.ranks * STRIP);
      }
      for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) {
        if (!inner.has_pairs(e)) continue;
        const S* a = t.down_a.template const_data_ptr<S>() + inner.blocks.begin[e] * t.F;
        inner.template pack_columns<P>(a + strip * STRIP, t.F, inner.blocks.ranks[e],
                                       inner.columns(strip), padded(inner.blocks.ranks[e]),
                                       packed_down + inner.begin[e] * STRIP);
      }
      for (int64_t block = 0; block < blocks.count(); ++block) {
        if (block + 1 < blocks.count()) {
          inner.prefetch(t.gate_out, block + 1, strip);
          inner.prefetch(t.up_out, block + 1, strip);
        }
        std::fill_n(sums, blocks.size() * STRIP, C{0});
        for (int64_t c = blocks.first_chunk(block); c < blocks.first_chunk(block + 1); ++c) {
          const Chunk& chunk = blocks.chunks()[c];
          // One call for both, because every call is inlined.
          for (int64_t i = 0; i < 2; ++i) {
            inner.template expand<Level>(chunk, *us[i], packed_gate + i * inner.ranks * STRIP,
                                         gate + i * CHUNK * STRIP, u_units, partial);
          }
          activate_chunk<P>(chunk, strip, blocks.first_token(block), gate, gate + CHUNK * STRIP,
                            sums, values);
          inner.template shrink<Level>(chunk, strip, strip == first_strip, values, packed_down,
                                       product, range_sums);
        }
        inner.write_block(sums, block, strip, summed);
      }
    }
  }
};

template <class S>
void run(const InnerTensors& tensors, const Routing& routing, const Blocks& blocks,
         const std::vector<double>& scaling, const Mask& mask, Activation activation,
         const Tensor& summed, const Tensor& h, const Tensor& u) {
  using C = Compute<S>;
  const TokenBlocks token_blocks(routing, tensors.T, tensors.K);
  const PairWeights<C> weights(tensors.weights, routing, compute_dtype(tensors.dtype));
  const Inner<S, C> inner(tensors, routing, token_blocks, blocks, weights, mask, activation);
  const Ranges ranges(tensors.F);
  const int64_t width = tensors.width, w = padded(width);
  const Tensor h_sums =
      empty(ranges.count * token_blocks.num_routed(), w, compute_dtype(tensors.dtype));
  const InnerForward<S, C> forward{inner, summed, h_sums.mutable_data_ptr<C>()};
  const int64_t work =
      (tensors.T * tensors.K + tensors.R) * (3 * width + 32) * tensors.F / ranges.count;
  torch::stable::parallel_for(0, ranges.count, grain(work), [&](int64_t begin, int64_t end) {
    std::vector<C> scratch(forward.scratch_size());
    vectorised([&](auto level) {
      for (int64_t range = begin; range < end; ++range) {
        forward.template run_range<decltype(level)>(range, ranges, scratch.data());
      }
    });
  });

  // Add the ranges, round to h, and gate.
  const std::vector<C> scales = to_compute<C>(scaling);
  S* h_data = h.mutable_data_ptr<S>();
  S* u_data = u.mutable_data_ptr<S>();
  inner.add_ranges(h_sums, ranges.count, [&](int64_t e, int64_t position, const C* sum) {
    const C scale = scales[e] * weights[routing.pair(position)];
    S* h_row = h_data + position * width;
    S* u_row = u_data + position * width;
    for (int64_t j = 0; j < width; ++j) {
      h_row[j] = narrow<S>(j < blocks.ranks[e] ? sum[j] : C{0});
      u_row[j] = narrow<S>(scale == 0 ? C{0} : scale * C(widen(h_row[j])));
    }
  });
  clear_rows<S>(h, routing.num_routed());
  clear_rows<S>(u, routing.num_routed());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ffn_inner(
    Tensor gate_out, Tensor up_out, Tensor u_gate, Tensor u_up, Tensor gate_b, Tensor up_b,
    Tensor down_a, Tensor weights, Tensor order, Tensor offsets, Tensor /*tiles*/,
    Tensor /*chunks*/, std::vector<int64_t> ranks, std::vector<double> scaling, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, std::string activation) {
  const Blocks blocks(ranks);
  check_size(int64_t(scaling.size()), blocks.num_experts(), "scaling");
  const InnerTensors tensors(gate_out, up_out, u_gate, u_up, gate_b, up_b, down_a, weights, blocks);
  const Routing routing(order, offsets, blocks.num_experts());
  check_size(routing.num_pairs(), tensors.T * tensors.K, "order");
  const Mask mask(dropout_p, dropout_per_expert, seed);
  const Tensor summed = empty(tensors.T, tensors.F, tensors.dtype);
  const Tensor h = empty(routing.num_pairs(), tensors.width, tensors.dtype);
  const Tensor u = empty(routing.num_pairs(), tensors.width, tensors.dtype);
  for_dtype(tensors.dtype, [&](auto type) {
    run<typename decltype(type)::type>(tensors, routing, blocks, scaling, mask,
                                       activation_named(activation), summed, h, u);
  });
  return {summed, h, u};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("ffn_inner", TORCH_BOX(&moelora::ffn_inner)); }
