// Products of bfloat16 panels on the matrix unit of newer Xeons (AMX): 16 x 16 sums over 32 values in one instruction.
//
// Always whole tiles, whatever the number of rows, so that a row's sums are the same alone and in a batch; rows beyond
// the last are read from the buffers' padding and their results are not used.
#pragma once

#include <utility>

#include "int8.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lm {

constexpr int kTile = 16;  // rows of a tile, and lanes of a row

// Whether products of this type run on the matrix unit.
#ifdef __AMX_BF16__
template <class T>
constexpr bool kHasTiles = std::is_same_v<T, Bf16>;
#else
template <class T>
constexpr bool kHasTiles = false;
#endif

// Rows of rank space are padded with zeros to a multiple of this.
template <class T>
constexpr int kRankUnit = kHasTiles<T> ? kTile : Lane<T>::KP;

// Weights that a thread will read soon, asked for line by line while it computes, since the matrix unit would wait for
// memory otherwise. With many rows a panel takes long enough to fetch all of the next one meanwhile, into the second-level
// cache. With some it is fetched a little ahead of the products, into the first. With a few memory is the bound anyway,
// and the CPU reads ahead by itself.
class Ahead {
  public:
    // During products of `rows` rows in all, however they are cut, with `count` panels from `first` on; `next` is a panel
    // of the same size that comes after them, or null.
    template <class T>
    Ahead(const Linear<T>& linear, int64_t first, int64_t count, const T* next, int64_t rows)
        : is_long_(rows >= 4 * kTile) {
        if (rows <= kTile || linear.is_int8()) return;
        const Packed<T>& weight = linear.plain;
        const int64_t step_lines = kTile * weight.width * 4 / kCacheLine, steps = weight.steps / kTile;
        const int64_t row_blocks = (rows + 2 * kTile - 1) / (2 * kTile);
        next_ = reinterpret_cast<const char*>(next);
        if (is_long_) {
            left_ = 0;
            next_left_ = next ? steps * step_lines : 0;
            lines_at_once_ = (step_lines + row_blocks - 1) / row_blocks;
        } else {
            const int64_t ahead = std::min(kSteps, steps);
            line_ = reinterpret_cast<const char*>(weight.panel(first)) + ahead * step_lines * kCacheLine;
            left_ = (count * steps - ahead) * step_lines;
            next_left_ = next ? ahead * step_lines : 0;
            lines_at_once_ = step_lines;
        }
    }

    bool is_long() const { return is_long_; }

    // Once for every panel, 32 rows and 32 values of what is summed.
    template <bool kIntoFirst>
    void fetch() {
        for (int64_t i = 0; i < lines_at_once_; ++i, line_ += kCacheLine) {
            if (left_ == 0) {
                line_ = next_;
                left_ = std::exchange(next_left_, 0);
                if (left_ == 0) {
                    lines_at_once_ = 0;
                    return;
                }
            }
            --left_;
            if constexpr (kIntoFirst)
                _mm_prefetch(line_, _MM_HINT_T0);
            else
                _mm_prefetch(line_, _MM_HINT_T1);
        }
    }

  private:
    static constexpr int64_t kSteps = 2;  // of 32 values
    const bool is_long_;
    const char* line_ = nullptr;
    const char* next_ = nullptr;
    int64_t left_ = 0, next_left_ = 0, lines_at_once_ = 0;
};

#ifdef __AMX_BF16__

// Ask the kernel for the tile registers; false where it or the CPU refuses. Once per process.
inline bool enable_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Shapes of the eight tile registers of this thread. Tiles 0 to 3 are always sums, `rows` x 16 float32.
//   whole  4, 5: rows of 32 values on the left; 6, 7: 32 x 16 on the right
//   mixed  4, 6: as above; 5: rows of 16 values on the left; 7: 16 x 16 on the right
struct alignas(kCacheLine) TileShapes {
    uint8_t bytes[64] = {1};  // palette 1; bytes of a row from 16 on, two for each tile; rows from 48 on
    constexpr TileShapes(bool is_mixed, int rows) {
        for (int tile = 0; tile < 8; ++tile) {
            bytes[16 + 2 * tile] = is_mixed && tile == 5 ? 32 : 64;
            bytes[48 + tile] = tile < 6 ? rows : is_mixed && tile == 7 ? kTile / 2 : kTile;
        }
    }
};
// Constants, not variables of a function: to the compiler _tile_loadconfig reads but the first eight bytes.
inline constexpr TileShapes kWholeTiles{false, kTile};
inline constexpr TileShapes kMixedTiles[] = {{true, 4}, {true, 8}, {true, kTile}};

// Every thread of a step: whole tiles of 16 rows unless a MixedTiles is alive.
class TileScope {
  public:
    TileScope() { _tile_loadconfig(kWholeTiles.bytes); }
    ~TileScope() { _tile_release(); }
    TileScope(const TileScope&) = delete;
};

// Mixed tiles for products of up to `rows` rows at a time: as few as 4 or 8 if that is enough, which saves time and
// changes no row's sums. Rows that a product does not fill are still read and written.
class MixedTiles {
  public:
    explicit MixedTiles(int64_t rows) { _tile_loadconfig(kMixedTiles[rows <= 4 ? 0 : rows <= 8 ? 1 : 2].bytes); }
    ~MixedTiles() { _tile_loadconfig(kWholeTiles.bytes); }
    MixedTiles(const MixedTiles&) = delete;
};

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// C (rows, 32) = A times one panel. kPasses: A passes by the first-level cache, which keeps the panel.
#define LM_LOAD_LEFT(tile, from)                     \
    if constexpr (kPasses)                           \
        _tile_stream_loadd(tile, from, a_bytes);     \
    else                                             \
        _tile_loadd(tile, from, a_bytes)
template <bool kPasses>
inline void multiply_panel_tiles(const Bf16* a, int64_t lda, int64_t rows, const Packed<Bf16>& weight, int64_t panel,
                                 float* c, int64_t ldc, Ahead& ahead) {
    const int64_t step_bytes = weight.width * 4, a_bytes = lda * 2, c_bytes = ldc * 4;
    const int64_t blocks = weight.steps / kTile;
    const char* right = reinterpret_cast<const char*>(weight.panel(panel));
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
        const bool has_second = rows - row > kTile;
        const Bf16* upper = a + row * lda;
        const Bf16* lower = upper + kTile * lda;
        zero_sums();
        for (int64_t k = 0; k < blocks; ++k) {
            const char* w = right + k * kTile * step_bytes;
            ahead.fetch<!kPasses>();
            _tile_loadd(6, w, step_bytes);
            _tile_loadd(7, w + kCacheLine, step_bytes);
            LM_LOAD_LEFT(4, upper + k * 2 * kTile);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (has_second) {
                LM_LOAD_LEFT(5, lower + k * 2 * kTile);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        float* out = c + row * ldc;
        _tile_stored(0, out, c_bytes);
        _tile_stored(1, out + kTile, c_bytes);
        if (has_second) {
            _tile_stored(2, out + kTile * ldc, c_bytes);
            _tile_stored(3, out + kTile * ldc + kTile, c_bytes);
        }
    }
}
#undef LM_LOAD_LEFT

// As multiply_panels, for panels of 32 columns. `a` and `c` must have rows up to a multiple of 32.
inline void multiply_tiles(const Bf16* a, int64_t lda, int64_t rows, const Packed<Bf16>& weight, int64_t first,
                           int64_t count, float* c, int64_t ldc, Ahead& ahead) {
    for (int64_t i = 0; i < count; ++i, c += kPanel)
        if (ahead.is_long())
            multiply_panel_tiles<true>(a, lda, rows, weight, first + i, c, ldc, ahead);
        else
            multiply_panel_tiles<false>(a, lda, rows, weight, first + i, c, ldc, ahead);
}

// C (rows, 16 count) = A times panels of 16 columns. `a` and `c` must have rows up to a multiple of 16. Under
// MixedTiles.
inline void multiply_narrow_tiles(const Bf16* a, int64_t lda, int64_t rows, const Packed<Bf16>& weight, int64_t first,
                                  int64_t count, float* c, int64_t ldc) {
    const int64_t a_bytes = lda * 2, c_bytes = ldc * 4, blocks = weight.steps / kTile;
    for (int64_t panel = 0; panel < count; ++panel) {
        const char* right = reinterpret_cast<const char*>(weight.panel(first + panel));
        for (int64_t row = 0; row < rows; row += 4 * kTile) {
            const int64_t tiles = std::min<int64_t>(4, (rows - row + kTile - 1) / kTile);
            const Bf16* left = a + row * lda;
            zero_sums();
            for (int64_t k = 0; k < blocks; ++k) {
                const Bf16* l = left + k * 2 * kTile;
                _tile_loadd(6, right + k * kTile * kCacheLine, kCacheLine);
                _tile_loadd(4, l, a_bytes);
                _tile_dpbf16ps(0, 4, 6);
                if (tiles > 1) {
                    _tile_loadd(4, l + kTile * lda, a_bytes);
                    _tile_dpbf16ps(1, 4, 6);
                }
                if (tiles > 2) {
                    _tile_loadd(4, l + 2 * kTile * lda, a_bytes);
                    _tile_dpbf16ps(2, 4, 6);
                }
                if (tiles > 3) {
                    _tile_loadd(4, l + 3 * kTile * lda, a_bytes);
                    _tile_dpbf16ps(3, 4, 6);
                }
            }
            float* out = c + row * ldc + panel * kTile;
            _tile_stored(0, out, c_bytes);
            if (tiles > 1) _tile_stored(1, out + kTile * ldc, c_bytes);
            if (tiles > 2) _tile_stored(2, out + 2 * kTile * ldc, c_bytes);
            if (tiles > 3) _tile_stored(3, out + 3 * kTile * ldc, c_bytes);
        }
    }
}

// C (M, 32) += A (M, K), M the rows of the tiles, times one panel of 32 columns. Rows of A are padded with zeros to a
// multiple of 16 values; what lies behind the panel meets them there, so it must be finite. Under MixedTiles.
inline void add_mixed_tiles(const Bf16* a, int64_t lda, const Packed<Bf16>& weight, int64_t panel, float* c,
                            int64_t ldc) {
    const char* right = reinterpret_cast<const char*>(weight.panel(panel));
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + kTile, ldc * 4);
    for (int64_t k = 0; k < weight.steps; k += kTile / 2) {
        _tile_loadd(5, a + 2 * k, lda * 2);
        _tile_loadd(7, right + k * 2 * kCacheLine, 2 * kCacheLine);
        _tile_dpbf16ps(0, 5, 7);
        _tile_loadd(7, right + k * 2 * kCacheLine + kCacheLine, 2 * kCacheLine);
        _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + kTile, ldc * 4);
}

#else

inline bool enable_tiles() { return true; }  // none to ask for
struct TileScope {
    TileScope() {}
};
struct MixedTiles {
    explicit MixedTiles(int64_t) {}
};

#endif

// The base model's products: on the matrix unit where there is one, which alone is fast enough to read ahead for.
template <class T>
void multiply_weight(const Left<T>* a, int64_t lda, int64_t rows, const Packed<T>& weight, int64_t first, int64_t count,
                     float* c, int64_t ldc, Ahead& ahead) {
    if constexpr (kHasTiles<T>)
        multiply_tiles(a, lda, rows, weight, first, count, c, ldc, ahead);
    else
        multiply_panels<T>(a, lda, rows, weight, first, count, c, ldc);
}

}  // namespace lm
