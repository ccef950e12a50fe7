// The products of attention on the matrix unit: query rows in tiles of 16 against one chunk of keys and values.
#pragma once

#include "tiles.h"

namespace lm {

constexpr int kChunk = 64;  // keys

// Query rows that are computed together: several tiles' worth share the keys that they bring into the caches.
template <class T>
constexpr int kQueryRows = kHasTiles<T> ? 3 * kTile : kTileRows;

// Up to kQueryRows query rows (tokens x heads of one K/V head) of one sequence.
template <class T>
struct AttentionTile {
    alignas(64) float scores[kQueryRows<T> * kChunk];
    alignas(64) T weights[kQueryRows<T> * kChunk];
    alignas(64) float sum[kQueryRows<T> * kVec];  // of the weights, by lane
    float greatest[kQueryRows<T>];
    Buffer<float> output;  // (kQueryRows, head_dim)
    Buffer<T> queries;     // (kQueryRows, head_dim): the rows one after another, for the matrix unit
};

#ifdef __AMX_BF16__

// Scores of tiles of queries against up to kChunk keys; `keys` point at groups of 16 that lie side by side, their
// lanes `step_bytes` apart. `dim` is a multiple of 32. Under MixedTiles.
inline void score_tiles(AttentionTile<Bf16>& tile, int rows, int dim, const char* const* keys, int num_keys,
                        int64_t step_bytes) {
    const int groups = num_keys / kTile;
    for (int row = 0; row < rows; row += kTile) {
        const Bf16* queries = tile.queries.get() + row * int64_t{dim};
        float* scores = tile.scores + row * kChunk;
        zero_sums();
        for (int d = 0; d < dim; d += 2 * kTile) {
            const int64_t down = d / 2 * step_bytes;
            _tile_loadd(4, queries + d, dim * 2);
            _tile_loadd(6, keys[0] + down, step_bytes);
            _tile_dpbf16ps(0, 4, 6);
            if (groups > 1) {
                _tile_loadd(6, keys[1] + down, step_bytes);
                _tile_dpbf16ps(1, 4, 6);
            }
            if (groups > 2) {
                _tile_loadd(6, keys[2] + down, step_bytes);
                _tile_dpbf16ps(2, 4, 6);
            }
            if (groups > 3) {
                _tile_loadd(6, keys[3] + down, step_bytes);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, scores, kChunk * 4);
        if (groups > 1) _tile_stored(1, scores + kTile, kChunk * 4);
        if (groups > 2) _tile_stored(2, scores + 2 * kTile, kChunk * 4);
        if (groups > 3) _tile_stored(3, scores + 3 * kTile, kChunk * 4);
    }
}

// output += weights times values, `values` pointing at groups of 16 keys. Under MixedTiles.
inline void mix_tiles(AttentionTile<Bf16>& tile, int rows, int dim, const Bf16* const* values, int num_keys) {
    for (int row = 0; row < rows; row += kTile)
        for (int column = 0; column < dim; column += 2 * kTile) {
            float* output = tile.output.get() + row * int64_t{dim} + column;
            const Bf16* weights = tile.weights + row * kChunk;
            _tile_loadd(0, output, dim * 4);
            _tile_loadd(1, output + kTile, dim * 4);
            for (int group = 0; group < num_keys; group += kTile) {
                const Bf16* right = values[group / kTile] + 2 * column;
                _tile_loadd(5, weights + group, kChunk * 2);
                _tile_loadd(7, right, dim * 4);
                _tile_dpbf16ps(0, 5, 7);
                _tile_loadd(7, right + 2 * kTile, dim * 4);
                _tile_dpbf16ps(1, 5, 7);
            }
            _tile_stored(0, output, dim * 4);
            _tile_stored(1, output + kTile, dim * 4);
        }
}

#endif

}  // namespace lm
