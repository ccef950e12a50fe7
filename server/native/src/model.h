// Everything a step reads: packed weights of the base model, packed adapters, routers. Immutable while a step runs.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "tiles.h"

namespace lm {

// Projections of a decoder layer, in the order in which a layer computes them.
enum Projection : int { kQ, kK, kV, kO, kGate, kUp, kDown, kNumProjections };

// Projections with the same input form a group; the first one's index and how many follow.
struct Group {
    int first;
    int count;
};
constexpr Group kAttentionIn{kQ, 3}, kAttentionOut{kO, 1}, kMlpIn{kGate, 2}, kMlpOut{kDown, 1};

struct Shape {
    int32_t hidden, layers, heads, kv_heads, head_dim, intermediate, vocab;
    int32_t block_size;     // tokens in a block of the K/V cache, a multiple of 16
    int32_t max_positions;  // rows of the rotary tables
    int32_t is_tied;        // the embedding is the output head
    int32_t is_int8;        // weights of the projections and of the head have 8 bits
    float norm_eps, attention_scale;

    int64_t d_in(int projection) const {
        if (projection == kO) return int64_t{heads} * head_dim;
        return projection == kDown ? intermediate : hidden;
    }
    int64_t d_out(int projection) const {
        switch (projection) {
            case kQ: return int64_t{heads} * head_dim;
            case kK:
            case kV: return int64_t{kv_heads} * head_dim;
            case kGate:
            case kUp: return intermediate;
            default: return hidden;
        }
    }
    // First column of a projection in its packed matrix: q, k and v share one.
    int64_t column(int projection) const {
        if (projection == kK) return d_out(kQ);
        return projection == kV ? d_out(kQ) + d_out(kK) : 0;
    }
    int64_t qkv_width() const { return d_out(kQ) + 2 * d_out(kK); }
};

template <class T>
struct Layer {
    Linear<T> qkv, o, gate, up, down;
    std::vector<float> bias[kNumProjections];  // empty where the model has none
    std::vector<float> attention_norm, mlp_norm;

    Linear<T>& matrix(int projection) {
        switch (projection) {
            case kO: return o;
            case kGate: return gate;
            case kUp: return up;
            case kDown: return down;
            default: return qkv;
        }
    }
};

// One adapter's update of one projection, delta = B (g * (A x)). `rank` 0: the adapter does not touch it.
template <class T>
struct LoraPair {
    int64_t rank = 0;
    Packed<T> a;  // (rank, d_in), panels of 16
    Packed<T> b;  // (d_out, rank), followed by zeros: the matrix unit reads on to a multiple of kRankUnit
    int64_t width() const { return round_up(rank, kRankUnit<T>); }  // of a row of rank space, padded with zeros

    // Values of both matrices.
    int64_t measure(int64_t r, int64_t d_in, int64_t d_out) {
        rank = r;
        return a.measure(rank, d_in, kVec, kDepthUnit) + b.measure(d_out, rank, kPanel, Lane<T>::KP, kRankUnit<T>);
    }
    void allocate(int64_t r, int64_t d_in, int64_t d_out) {
        rank = r;
        a.allocate(rank, d_in, kVec, kDepthUnit);
        b.allocate(d_out, rank, kPanel, Lane<T>::KP, kRankUnit<T>);
    }
};

template <class T>
struct Adapter {
    std::vector<LoraPair<T>> pairs;  // layers x projections
    const LoraPair<T>& pair(int layer, int projection) const { return pairs[layer * kNumProjections + projection]; }
};

// Gate rows of one loaded router: per layer (index of q) or per projection, null where there is no gate.
struct Router {
    int32_t is_per_layer;
    int32_t num_gates;            // gates present
    float temperature;
    int32_t num_slots;            // E
    const float* const* rows;     // [layers * projections] -> (E, d_in)
    const float* const* biases;   // [layers * projections] -> (E,), or null
    float* layer_gates;           // (num_gates, T, E) to fill, or null
    const int32_t* gate_index;    // [layers * projections] -> ordinal of the gate, -1 where there is none
    const void* shortlist;        // ShortlistRouter<T>*, or null: the router looks at every slot
};

template <class T>
struct Model {
    Shape shape;
    std::vector<Layer<T>> layers;
    Linear<T> head;
    Buffer<T> weights;    // of all matrices, or
    Buffer<Byte> bytes;   // if they have 8 bits,
    Buffer<Bf16> scales;  // with these
    Buffer<T> embedding;  // (vocab, hidden) row-major; empty when tied
    std::vector<float> final_norm;
    std::vector<float> cosine, sine;  // (max_positions, head_dim / 2)

    explicit Model(const Shape& s) : shape(s), layers(s.layers) {
        // In the order in which a step reads them; a panel is a whole number of cache lines.
        std::vector<std::pair<Linear<T>*, int64_t>> places;
        int64_t size = 0;
        const auto add = [&](Linear<T>& matrix, int64_t n, int64_t k) {
            places.emplace_back(&matrix, size);
            size += s.is_int8 ? matrix.bytes.measure(n, k, kPanel, kDepthUnit)
                              : matrix.plain.measure(n, k, kPanel, kDepthUnit);
        };
        for (auto& layer : layers) {
            add(layer.qkv, s.qkv_width(), s.hidden);
            for (int projection : {kO, kGate, kUp, kDown})
                add(layer.matrix(projection), s.d_out(projection), s.d_in(projection));
        }
        add(head, s.vocab, s.hidden);
        if (s.is_int8) {
            bytes.resize(size);
            scales.resize(size / kGroup);
        } else {
            weights.resize(size);
        }
        for (const auto& [matrix, place] : places) {
            if (s.is_int8) {
                matrix->bytes.start = bytes.get() + place;
                matrix->scales = scales.get() + place / kGroup;
            } else {
                matrix->plain.start = weights.get() + place;
            }
        }
        if (!s.is_tied) embedding.resize(int64_t{s.vocab} * s.hidden);
        const int64_t table = int64_t{s.max_positions} * (s.head_dim / 2);
        cosine.resize(table);
        sine.resize(table);
    }

    void embed(int64_t token, float* out) const {
        for (int64_t k = 0; k < shape.hidden; ++k)
            out[k] = embedding ? to_float(embedding.get()[token * shape.hidden + k]) : head.value(token, k);
    }
};

// The K/V cache: per layer, block and head, keys as lanes (head_dim / KP, block_size), values as lanes
// (block_size / KP, head_dim), so that both products of attention read whole vectors.
template <class T>
struct Cache {
    T* data;
    int64_t layer_stride;  // values from one layer to the next
    int64_t tile;          // values of one head's keys (or values) in a block
    int32_t kv_heads;

    T* keys(int layer, int64_t block, int head) const {
        return data + layer * layer_stride + (block * kv_heads + head) * 2 * tile;
    }
    T* values(int layer, int64_t block, int head) const { return keys(layer, block, head) + tile; }

    // Write one token's key or value (dim,), a multiple of 16, at its place `offset` in a block of `size`.
    static void store_key(const float* key, int64_t dim, int64_t size, int64_t offset, T* keys) {
        constexpr int KP = Lane<T>::KP;
        alignas(kCacheLine) T narrow[kVec];
        for (int64_t d = 0; d < dim; d += kVec) {
            store16(narrow, load16(key + d));
            for (int64_t k = 0; k < kVec / KP; ++k)
                std::memcpy(static_cast<void*>(keys + ((d / KP + k) * size + offset) * KP), narrow + k * KP, 4);
        }
    }
    static void store_value(const float* value, int64_t dim, int64_t offset, T* values) {
        constexpr int KP = Lane<T>::KP;
        T* row = values + offset / KP * dim * KP;
        if constexpr (KP == 1) {
            std::memcpy(row, value, dim * sizeof(T));
        } else {
            alignas(kCacheLine) T narrow[kVec];
            for (int64_t d = 0; d < dim; d += kVec) {
                store16(narrow, load16(value + d));
                store_halves(row + d * KP, offset % KP, &narrow->bits);
            }
        }
    }
};

// How a group of tokens gets its gates (one per distinct plan of a batch).
struct Plan {
    int32_t router;         // index into the step's routers, or -1: fixed weights
    int32_t top_k;
    int32_t num_slots;      // entries of `slots`
    const int32_t* slots;   // routed: allowed slots ascending; fixed: the slots with a weight
    const float* weights;   // fixed only
};

// One step over the packed tokens of all sequences. Letters: T tokens, S sequences, E slots.
struct Step {
    int32_t num_tokens, num_sequences, num_plans, num_routers, num_slots, num_logits;
    int32_t num_checks, max_blocks;
    const int32_t* token_ids;       // (T,)
    const int32_t* positions;       // (T,)
    const int32_t* plan_of_token;   // (T,)
    const int32_t* first_token;     // (S + 1,): sequence s owns tokens first_token[s] .. first_token[s + 1]
    const int32_t* block_tables;    // (S, max_blocks)
    const int32_t* logit_positions; // (num_logits,)
    const Plan* plans;
    const Router* routers;
    const void* const* adapters;    // (E,) Adapter<T>*, null where the slot has no adapter
    const int32_t* slot_order;      // (E,) all slots, in the order in which their updates are added up
    float* logits;                  // (num_logits, vocab)
    float* greatest;                // (num_logits,) greatest logit; NaN if any is
    int32_t* greatest_id;           // (num_logits,) lowest token that has it
    const int32_t* check_positions; // (num_checks,) tokens of which no logits are wanted
    int32_t* finite;                // (num_checks,) 1 where what the layers made of the token is finite, else 0
    float* share;                   // (T, E) zeroed: each token's gate weights averaged over the gates
    float* inputs;                  // (layers, T, hidden) attention inputs to fill, or null
};

}  // namespace lm
