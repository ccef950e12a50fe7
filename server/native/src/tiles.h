// Products of bfloat16 panels on the matrix unit of newer Xeons (AMX): 16 x 16 sums over 32 values in one instruction.
//
// Always whole tiles, whatever the number of rows, so that a row's sums are the same alone and in a batch; rows beyond
// the last are read from the buffers' padding and their results are not used.
#pragma once

#include "gemm.h"

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

namespace lm {

constexpr int kTile = 16;  // rows of a tile, and lanes of a row

// Ask the kernel for the tile registers; false where it or the CPU refuses. Once per process.
inline bool enable_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Every thread configures its own tiles: eight of 16 rows of 64 bytes.
class TileScope {
  public:
    TileScope() {
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = kTile;
        }
        _tile_loadconfig(config);
    }
    ~TileScope() { _tile_release(); }
};

// As multiply_panels, for panels of 32 columns. `a` and `c` must have rows up to a multiple of 32.
inline void multiply_tiles(const Bf16* a, int64_t lda, int64_t rows, const Packed<Bf16>& weight, int64_t first,
                           int64_t count, float* c, int64_t ldc) {
    const int64_t step_bytes = weight.width * 4, a_bytes = lda * 2, c_bytes = ldc * 4;
    const int64_t blocks = weight.steps / kTile;
    for (int64_t panel = 0; panel < count; ++panel) {
        const char* right = reinterpret_cast<const char*>(weight.panel(first + panel));
        for (int64_t row = 0; row < rows; row += 2 * kTile) {
            const bool has_second = rows - row > kTile;
            const Bf16* upper = a + row * lda;
            const Bf16* lower = upper + kTile * lda;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < blocks; ++k) {
                const char* w = right + k * kTile * step_bytes;
                _tile_loadd(6, w, step_bytes);
                _tile_loadd(7, w + kCacheLine, step_bytes);
                _tile_loadd(4, upper + k * 2 * kTile, a_bytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (has_second) {
                    _tile_loadd(5, lower + k * 2 * kTile, a_bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            float* out = c + row * ldc + panel * kPanel;
            _tile_stored(0, out, c_bytes);
            _tile_stored(1, out + kTile, c_bytes);
            if (has_second) {
                _tile_stored(2, out + kTile * ldc, c_bytes);
                _tile_stored(3, out + kTile * ldc + kTile, c_bytes);
            }
        }
    }
}

}  // namespace lm

#else

namespace lm {

inline bool enable_tiles() { return true; }  // none to ask for
struct TileScope {
    TileScope() {}
};

}  // namespace lm

#endif

namespace lm {

// The base model's products: on the matrix unit where there is one.
template <class T>
void multiply_weight(const T* a, int64_t lda, int64_t rows, const Packed<T>& weight, int64_t first, int64_t count,
                     float* c, int64_t ldc) {
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, Bf16>) return multiply_tiles(a, lda, rows, weight, first, count, c, ldc);
#endif
    multiply_panels(a, lda, rows, weight, first, count, c, ldc);
}

}  // namespace lm
