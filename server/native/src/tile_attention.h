// The products of attention on the matrix unit: query rows in tiles of 16 against one chunk of keys and values.
#pragma once

#include "tiles.h"

namespace lm {

constexpr int kChunk = 64;  // keys

// Query rows that are computed together: several tiles' worth share the keys that they bring into the caches.
template <class T>
constexpr int kQueryRows = kHasTiles<T> ? 3 * kTile : 12;

// Up to kQueryRows query rows (tokens x heads of one K/V head) of one sequence.
template <class T>
struct AttentionTile {
    alignas(64) float scores[kQueryRows<T> * kChunk];
    alignas(64) T weights[kQueryRows<T> * kChunk];
    alignas(64) float sum[kQueryRows<T> * kVec];  // of the weights, by lane
    float greatest[kQueryRows<T>];                // score that the weights are relative to
    Buffer<float> output;  // (kQueryRows, head_dim)
    Buffer<T> queries;     // (kQueryRows, head_dim): the rows one after another, for the matrix unit
};

#ifdef __AMX_BF16__

// Scores (16, kChunk) of one tile of queries (16, dim) against up to kChunk keys; `keys` point at groups of 16 that lie
// side by side, their lanes `step_bytes` apart. `dim` is a multiple of 32. Under MixedTiles.
inline void score_tile(const Bf16* queries, float* scores, int dim, const Bf16* const* keys, int groups,
                       int64_t step_bytes) {
    zero_sums();
    for (int d = 0; d < dim; d += 2 * kTile) {
        const int64_t down = d / 2 * step_bytes;
        const auto key = [&](int group) { return reinterpret_cast<const char*>(keys[group]) + down; };
        _tile_loadd(4, queries + d, dim * 2);
        _tile_loadd(6, key(0), step_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (groups > 1) {
            _tile_loadd(6, key(1), step_bytes);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (groups > 2) {
            _tile_loadd(6, key(2), step_bytes);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (groups > 3) {
            _tile_loadd(6, key(3), step_bytes);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, scores, kChunk * 4);
    if (groups > 1) _tile_stored(1, scores + kTile, kChunk * 4);
    if (groups > 2) _tile_stored(2, scores + 2 * kTile, kChunk * 4);
    if (groups > 3) _tile_stored(3, scores + 3 * kTile, kChunk * 4);
}

// output (16, dim) += weights (16, kChunk) times values, `values` pointing at groups of 16 keys. Under MixedTiles.
inline void mix_tile(const Bf16* weights, float* output, int dim, const Bf16* const* values, int groups) {
    for (int column = 0; column < dim; column += 4 * kTile) {
        const bool is_whole = dim - column >= 4 * kTile;  // else there are 32 columns left
        float* out = output + column;
        _tile_loadd(0, out, dim * 4);
        _tile_loadd(1, out + kTile, dim * 4);
        if (is_whole) {
            _tile_loadd(2, out + 2 * kTile, dim * 4);
            _tile_loadd(3, out + 3 * kTile, dim * 4);
        }
        for (int group = 0; group < groups; ++group) {
            const Bf16* right = values[group] + 2 * column;
            _tile_loadd(5, weights + group * kTile, kChunk * 2);
            _tile_loadd(7, right, dim * 4);
            _tile_dpbf16ps(0, 5, 7);
            _tile_loadd(7, right + 2 * kTile, dim * 4);
            _tile_dpbf16ps(1, 5, 7);
            if (is_whole) {
                _tile_loadd(7, right + 4 * kTile, dim * 4);
                _tile_dpbf16ps(2, 5, 7);
                _tile_loadd(7, right + 6 * kTile, dim * 4);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out, dim * 4);
        _tile_stored(1, out + kTile, dim * 4);
        if (is_whole) {
            _tile_stored(2, out + 2 * kTile, dim * 4);
            _tile_stored(3, out + 3 * kTile, dim * 4);
        }
    }
}

#endif

}  // namespace lm
