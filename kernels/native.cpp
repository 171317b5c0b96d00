// Decoder layers and linear maps in bf16 for CPUs with AMX: plain C functions on raw pointers, one OpenMP region a call.
//
// Weights are panels of 16 output columns, a panel is a row of tiles, a tile holds 32 inputs of 16 columns in the order
// that TDPBF16PS reads them: [columns / 16][inputs / 32][16 pairs of inputs][16 columns][2]. Weights of 8 bits lie as
// [columns / 16][inputs / 32][16 pairs of inputs][2][16 columns], become bf16, which holds each of them exactly, on
// their way to the tiles, and meet their column's scale in the sum. Sums are fp32; a value is rounded to bf16 where it
// is stored. What a row becomes does not depend on the rows beside it, bit for bit: every sum runs in one order, and
// what a mask hides adds exact zeros.

#include <immintrin.h>
#include <omp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using bf16 = uint16_t;
using std::min;

constexpr int64_t TILE = 1024;         // bytes, of bf16
constexpr int64_t AHEAD = 2048;        // bytes of int8 that are fetched before they are widened, which takes as long
constexpr int64_t SPAN = 8;            // tiles of two panels that are widened at once for few rows: they stay in L1
constexpr int64_t SUPERBLOCK = 256;    // rows that share one pass over a thread's weights: their inputs stay in L2
constexpr int64_t KEYS = 128;          // keys between two looks at the running maximum
constexpr int64_t QUERY_TILES = 4;     // tiles of 16 queries that share one reading of keys and values
constexpr int64_t MAX_DIM = 256;       // of a head
constexpr int64_t LOW_CHUNK = 1024;    // elements: A x for 16 rows and ranks, high and low, each twice: for B's two parts
constexpr float HIDDEN_MAX = -1e30f;   // a running maximum before anything was seen; finite, so that differences are

struct Matrix {
    const uint8_t* tiles;
    const bf16* bias;     // or null
    const float* scales;  // of each column of whole panels, where tiles hold int8; or null: they hold bf16
};

// 16 columns of a matrix.
struct Panel {
    const uint8_t* tiles;
    const float* scales;
};

inline Panel panel_of(const Matrix& matrix, int64_t number, int64_t k_tiles) {
    if (!matrix.scales) return {matrix.tiles + number * k_tiles * TILE, nullptr};
    return {matrix.tiles + number * k_tiles * (TILE / 2), matrix.scales + number * 16};
}

// A thread's place for int8 panels as bf16: for few rows parts of them, one after another; for many the pair of panels
// of a slot, as long as no other pair comes to it.
struct Wide {
    uint8_t* room;
    int64_t slot;  // bytes; 0: few rows
    const uint8_t* held[8];
};

struct Layer {
    Matrix qkv, o, gate, up, down;
    const bf16 *input_norm, *post_norm;
    const bf16 *q_norm, *k_norm;  // or null
    int64_t window;               // 0: none
};

struct Shape {
    int64_t hidden, heads, kv_heads, dim, ffn;
    double eps, scale;
};

// Keys and values of the sequences of one depth: a base a layer, strides in elements, rows that exist.
struct Cache {
    bf16* const* layers;
    int64_t head_stride, row_stride, rows;
};

// `count` query rows from `row` on, the first at `position` of its context; its keys lie in `runs` runs.
struct Sequence {
    int64_t row, count, position, cache, first_run, runs;
};

struct Run {
    int64_t row, tokens;
};

// A low-rank update y += B (A x) of one map, in tiles of bf16: every number of A, B and A x is the sum of two, which
// keeps 16 of its bits. `chunks` of 16 ranks; 0: none.
struct Update {
    const uint8_t* a;  // [chunks][high, low][inputs / 32] tiles
    const uint8_t* b;  // [columns / 16][chunks] tiles: 16 ranks high, the same 16 low
    int64_t chunks;
};

// What an adapter changes of a layer. `wide`: gate and up, which share their inputs; the first half of its chunks is
// the one's, the second the other's, of b as of a, and there is a panel of both for 16 columns of each.
struct Updates {
    Update qkv, o, wide, down;
};

struct Adapter {
    const Updates* layers;
    int64_t chunks;  // the most that one of its updates has
};

// Running sums [slots][hidden]: after `layer` layers each row is added to the sum of its slot; slot -1: to none.
struct Pool {
    int64_t layer;
    const int64_t* slot_of;
    float* sums;
    int64_t slots;
};

// What the threads share of one stage of a layer: which units of its work are taken, how many are finished.
struct Stage {
    alignas(64) std::atomic<int64_t> taken{0};
    alignas(64) std::atomic<int64_t> finished{0};
};

// A thread's own memory.
struct alignas(64) Scratch {
    float c[32 * MAX_DIM];                              // a block of outputs
    float adapted[32 * 32];                             // 32 columns of it, all rows by one adapter
    uint32_t queries[QUERY_TILES][MAX_DIM / 32][256];   // Q^T in tiles
    float scores[QUERY_TILES][KEYS][16];                // S^T, then P^T: a lane a query
    uint32_t probs[QUERY_TILES][KEYS / 32][256];        // P in tiles
    float out[QUERY_TILES][16 * MAX_DIM];
    uint32_t values[KEYS / 2 * MAX_DIM];                // V, two rows interleaved
    bf16 tail[16 * MAX_DIM];                            // keys at the end of a run
    int32_t places[QUERY_TILES][16];                    // positions of the queries
};

// ---- sixteen lanes ----

inline __m512 load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// 2^t, relative error below 2e-7 (a minimax polynomial of degree 5 on [-1/2, 1/2]); 0 below the normal numbers, NaN
// stays NaN.
inline __m512 exp2(__m512 t) {
    const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.3264727e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671513e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5507336e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022242e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314700e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    const __mmask16 normal = _mm512_cmp_ps_mask(t, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, p, whole);
}

inline __m512 silu(__m512 x) {
    // the bound keeps 1 + exp(-x) finite; min returns its second operand where that is NaN
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2(t));
    const __m512 r = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(x, _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f))));
}

// ---- tiles: 0-3 sums, 4-5 left operands, 6-7 right operands ----

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Sums and left operands have `rows` rows: a single row costs less than sixteen.
void configure(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = tile < 6 ? (uint8_t)rows : 16;
    }
    _tile_loadconfig(&config);
}

// Inputs [rows][k] are kept in tiles too: [rows / 16][k / 32][16 rows][32]. Where sixteen inputs of a row begin:
inline int64_t place(int64_t row, int64_t column, int64_t k) {
    return row / 16 * 16 * k + column / 32 * 512 + row % 16 * 32 + column % 32;
}

// Adds inputs times `k_tiles` tiles of two panels to the sums. b: the inputs of rows 16-31, or null.
inline void accumulate(const bf16* a, const bf16* b, const uint8_t* w0, const uint8_t* w1, int64_t k_tiles) {
    for (int64_t k = 0; k < k_tiles; k++) {
        _tile_loadd(4, a + k * 512, 64);
        _tile_loadd(6, w0 + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w1 + k * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!b) continue;
        _tile_loadd(5, b + k * 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

inline void clear_sums(bool two) {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

inline void store_sums(bool two, float* c, int64_t width) {
    _tile_stored(0, c, width * 4);
    _tile_stored(1, c + 16, width * 4);
    if (two) {
        _tile_stored(2, c + 16 * width, width * 4);
        _tile_stored(3, c + 16 * width + 16, width * 4);
    }
}

// c [16 or 32 rows][width]: columns 0-15 = inputs times the panel w0, 16-31 = inputs times w1.
void multiply(const bf16* a, bool two, const uint8_t* w0, const uint8_t* w1, int64_t k_tiles, float* c, int64_t width) {
    clear_sums(two);
    accumulate(a, two ? a + k_tiles * 512 : nullptr, w0, w1, k_tiles);
    store_sums(two, c, width);
}

// Sixteen weights of int8, exactly.
inline __m512 load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// `tiles` tiles of int8 as bf16.
inline void widen(const uint8_t* from, int64_t tiles, uint8_t* to) {
    for (int64_t at = 0; at < tiles * TILE; at += 64, from += 32) {
        _mm_prefetch((const char*)from + AHEAD, _MM_HINT_T0);
        const __m512i even = _mm512_castps_si512(load((const int8_t*)from));
        const __m512i odd = _mm512_castps_si512(load((const int8_t*)from + 16));
        _mm512_store_si512(to + at, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
    }
}

// The same with `ROWS` rows and panels of int8, before their scales: so few that to widen tiles for the matrix unit costs
// more than to multiply. Sums run in the order of TDPBF16PS, so that a row becomes what it becomes among many: a tile's
// even inputs and its odd ones apart, then both.
template <int ROWS>
void multiply_few(const bf16* a, const uint8_t* w0, const uint8_t* w1, int64_t k_tiles, float* c, int64_t width) {
    __m512 sums[2][ROWS];
    for (int row = 0; row < ROWS; row++) sums[0][row] = sums[1][row] = _mm512_setzero_ps();
    for (int64_t k = 0; k < k_tiles; k++) {
        alignas(64) float x[ROWS][32];
        __m512 even[2][ROWS], odd[2][ROWS];
        for (int row = 0; row < ROWS; row++) {
            _mm512_store_ps(x[row], load(a + k * 512 + row * 32));
            _mm512_store_ps(x[row] + 16, load(a + k * 512 + row * 32 + 16));
            even[0][row] = even[1][row] = odd[0][row] = odd[1][row] = _mm512_setzero_ps();
        }
        const int8_t* w[2] = {(const int8_t*)w0 + k * (TILE / 2), (const int8_t*)w1 + k * (TILE / 2)};
        for (int pair = 0; pair < 16; pair++)
            for (int side = 0; side < 2; side++) {
                _mm_prefetch((const char*)w[side] + pair * 32 + AHEAD, _MM_HINT_T0);
                const __m512 first = load(w[side] + pair * 32), second = load(w[side] + pair * 32 + 16);
                for (int row = 0; row < ROWS; row++) {
                    even[side][row] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[row][2 * pair]), even[side][row]);
                    odd[side][row] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[row][2 * pair + 1]), odd[side][row]);
                }
            }
        for (int row = 0; row < ROWS; row++)
            for (int side = 0; side < 2; side++)
                sums[side][row] = _mm512_add_ps(sums[side][row], _mm512_add_ps(even[side][row], odd[side][row]));
    }
    for (int row = 0; row < ROWS; row++)
        for (int side = 0; side < 2; side++) _mm512_storeu_ps(c + row * width + side * 16, sums[side][row]);
}

// The same with `rows` rows and panels of either kind; `slot` of `wide` is where they are held.
void multiply(const bf16* a, int64_t rows, Panel p0, Panel p1, int64_t k_tiles, float* c, int64_t width, Wide& wide,
              int64_t slot = 0) {
    const bool two = rows > 16;
    if (!p0.scales) return multiply(a, two, p0.tiles, p1.tiles, k_tiles, c, width);
    if (rows == 1) {
        multiply_few<1>(a, p0.tiles, p1.tiles, k_tiles, c, width);
    } else if (rows == 2) {
        multiply_few<2>(a, p0.tiles, p1.tiles, k_tiles, c, width);
    } else if (wide.slot) {
        uint8_t* room = wide.room + slot * wide.slot;
        if (wide.held[slot] != p0.tiles) {
            widen(p0.tiles, k_tiles, room);
            widen(p1.tiles, k_tiles, room + k_tiles * TILE);
            wide.held[slot] = p0.tiles;
        }
        multiply(a, two, room, room + k_tiles * TILE, k_tiles, c, width);
    } else {
        clear_sums(two);
        for (int64_t k = 0; k < k_tiles; k += SPAN) {
            const int64_t some = min(SPAN, k_tiles - k);
            widen(p0.tiles + k * (TILE / 2), some, wide.room);
            widen(p1.tiles + k * (TILE / 2), some, wide.room + SPAN * TILE);
            const bf16* from = a + k * 512;
            accumulate(from, two ? from + k_tiles * 512 : nullptr, wide.room, wide.room + SPAN * TILE, some);
        }
        store_sums(two, c, width);
    }
    const __m512 s0 = _mm512_loadu_ps(p0.scales), s1 = _mm512_loadu_ps(p1.scales);
    for (float* at = c; at < c + rows * width; at += width) {
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), s0));
        _mm512_storeu_ps(at + 16, _mm512_mul_ps(_mm512_loadu_ps(at + 16), s1));
    }
}

// out [16 or 32 rows][out_width] = c [..][width] plus, in columns 0-15, `low0` times the panel b0 of an update, in 16-31
// low1 times b1; `stride` elements of low before the next sixteen rows.
void expand(const bf16* low0, const bf16* low1, int64_t stride, bool two, const uint8_t* b0, const uint8_t* b1,
            int64_t chunks, const float* c, int64_t width, float* out, int64_t out_width) {
    const int64_t c_stride = width * 4, out_stride = out_width * 4;
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    if (two) {
        _tile_loadd(2, c + 16 * width, c_stride);
        _tile_loadd(3, c + 16 * width + 16, c_stride);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        _tile_loadd(6, b0 + chunk * TILE, 64);
        _tile_loadd(7, b1 + chunk * TILE, 64);
        for (int64_t at = chunk * LOW_CHUNK; at < (chunk + 1) * LOW_CHUNK; at += LOW_CHUNK / 2) {
            _tile_loadd(4, low0 + at, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, low1 + at, 64);
            _tile_dpbf16ps(1, 5, 7);
            if (two) {
                _tile_loadd(4, low0 + stride + at, 64);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(5, low1 + stride + at, 64);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, out, out_stride);
    _tile_stored(1, out + 16, out_stride);
    if (two) {
        _tile_stored(2, out + 16 * out_width, out_stride);
        _tile_stored(3, out + 16 * out_width + 16, out_stride);
    }
}

// Calls work(unit) for the units that this thread takes, and returns when all are finished, whoever did them. A thread
// that the system has put aside holds nobody up unless it has taken a unit: at barriers it would, and on a machine
// that others use too a step took 80 times as long.
template <class Work>
void share(Stage& stage, int64_t units, int64_t threads, Work work) {
    const int64_t some = std::max<int64_t>(1, units / (threads * 16));
    for (int64_t first; (first = stage.taken.fetch_add(some, std::memory_order_relaxed)) < units;) {
        const int64_t last = min(units, first + some);
        for (int64_t unit = first; unit < last; unit++) work(unit);
        stage.finished.fetch_add(last - first, std::memory_order_release);
    }
    for (int64_t turn = 0; stage.finished.load(std::memory_order_acquire) < units; turn++)
        if (turn < 2000)
            _mm_pause();
        else
            sched_yield();
}

// Calls work(column block, first row, rows) for all rows of `columns` column blocks, 32 rows at a time. The rows of a
// unit meet several column blocks one after another, while they lie in the first cache; where `widened`, a column block
// meets all rows of the unit, while it is held as bf16.
template <class Work>
void share_blocks(Stage& stage, int64_t rows, int64_t columns, int64_t threads, bool widened, Work work) {
    const int64_t superblocks = (rows + SUPERBLOCK - 1) / SUPERBLOCK;
    const int64_t wide = rows <= 32 ? 1 : std::clamp<int64_t>(superblocks * columns / (threads * 12), 1, 8);
    const int64_t groups = (columns + wide - 1) / wide;
    share(stage, groups * superblocks, threads, [&](int64_t unit) {
        const int64_t first = unit / groups * SUPERBLOCK, last = min(rows, first + SUPERBLOCK);
        const int64_t begin = unit % groups * wide, end = min(columns, begin + wide);
        const auto block = [&](int64_t column, int64_t row) { work(column, row, min<int64_t>(32, last - row)); };
        if (widened)
            for (int64_t column = begin; column < end; column++)
                for (int64_t row = first; row < last; row += 32) block(column, row);
        else
            for (int64_t row = first; row < last; row += 32)
                for (int64_t column = begin; column < end; column++) block(column, row);
    });
}

// ---- norms and rotation ----

float inverse_rms(const float* x, int64_t width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / width + eps);
}

// Row `row` of tiled inputs: the norm of x [k].
void rms_norm(const bf16* x, const bf16* weight, int64_t k, float eps, bf16* inputs, int64_t row) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 v = load(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / k + eps));
    for (int64_t i = 0; i < k; i += 16)
        store(inputs + place(row, i, k), _mm512_mul_ps(_mm512_mul_ps(load(x + i), scale), load(weight + i)));
}

// One head of one row: norm where there is one, rotate (sin carries the sign of each half), round.
void finish_head(float* x, int64_t dim, const bf16* norm, float eps, const bf16* cos, const bf16* sin, bf16* out) {
    if (norm) {
        const __m512 scale = _mm512_set1_ps(inverse_rms(x, dim, eps));
        for (int64_t i = 0; i < dim; i += 16)
            _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), load(norm + i)));
    }
    for (int64_t i = 0; i < dim; i += 16) {
        const int64_t partner = i < dim / 2 ? i + dim / 2 : i - dim / 2;
        const __m512 turned = _mm512_mul_ps(_mm512_loadu_ps(x + partner), load(sin + i));
        store(out + i, _mm512_fmadd_ps(_mm512_loadu_ps(x + i), load(cos + i), turned));
    }
}

// ---- attention ----

// Query rows [first, first + rows) of one key head: row f is position f / group, head f % group of the group.
struct QueryBlock {
    const Sequence* sequence;
    int64_t kv_head, first, rows;
};

void transpose(const __m512i in[16], uint32_t* out) {
    __m512i t[16], u[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            u[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
            u[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
        }
    // u[4 i + c]: rows 4i .. 4i+3, columns c, c + 4, c + 8, c + 12
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd);
        const __m512i e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
        _mm512_store_si512(out + 16 * c, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_store_si512(out + 16 * (c + 8), _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_store_si512(out + 16 * (c + 4), _mm512_shuffle_i32x4(d, e, 0x88));
        _mm512_store_si512(out + 16 * (c + 12), _mm512_shuffle_i32x4(d, e, 0xdd));
    }
}

// Keys [0, count) of a run times the queries: S^T. `left`: rows of the run from `keys` on; nothing beyond is read.
void score(const bf16* keys, int64_t row_stride, int64_t left, int64_t count, int64_t dim, int64_t tiles, Scratch& my) {
    for (int64_t key = 0; key < count; key += 16) {
        const bf16* block = keys + key * row_stride;
        int64_t stride = row_stride * 2;
        if (left - key < 16) {
            std::memset(my.tail, 0, 16 * dim * 2);
            for (int64_t i = 0; i < left - key; i++) std::memcpy(my.tail + i * dim, block + i * row_stride, dim * 2);
            block = my.tail;
            stride = dim * 2;
        }
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < dim / 32; d++) {
            _tile_loadd(4, block + d * 32, stride);
            _tile_loadd(6, my.queries[0][d], 64);
            _tile_dpbf16ps(0, 4, 6);
            if (tiles > 1) {
                _tile_loadd(7, my.queries[1][d], 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (tiles > 2) {
                _tile_loadd(6, my.queries[2][d], 64);
                _tile_dpbf16ps(2, 4, 6);
            }
            if (tiles > 3) {
                _tile_loadd(7, my.queries[3][d], 64);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, my.scores[0][key], 64);
        if (tiles > 1) _tile_stored(1, my.scores[1][key], 64);
        if (tiles > 2) _tile_stored(2, my.scores[2][key], 64);
        if (tiles > 3) _tile_stored(3, my.scores[3][key], 64);
    }
}

// Rows [0, count) of V, `left` of which exist (the rest is zero), interleaved by pairs.
void interleave(const bf16* rows, int64_t row_stride, int64_t left, int64_t count, int64_t dim, Scratch& my) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t row = 0; row < count; row += 2)
        for (int64_t d = 0; d < dim; d += 32) {
            const bf16* at = rows + row * row_stride + d;
            const __m512i even = row < left ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
            const __m512i odd = row + 1 < left ? _mm512_loadu_si512(at + row_stride) : _mm512_setzero_si512();
            _mm512_store_si512(&my.values[row / 2 * dim + d], _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(&my.values[row / 2 * dim + d + 16], _mm512_permutex2var_epi16(even, high, odd));
        }
}

// Turns the scores of a tile of queries into probabilities. Keys stand at `position` and on, `seen` of `count` exist.
void soften(int64_t tile, int64_t position, int64_t seen, int64_t count, int64_t window, int64_t dim, __m512 scale,
            __m512& peak, __m512& sum, Scratch& my) {
    float(*s)[16] = my.scores[tile];
    const __m512i places = _mm512_load_si512(my.places[tile]);
    const int64_t lowest = _mm512_reduce_min_epi32(places), highest = _mm512_reduce_max_epi32(places);
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    if (position + seen - 1 > lowest || (window && position <= highest - window))
        for (int64_t key = 0; key < seen; key++) {
            const __m512i place = _mm512_set1_epi32((int32_t)(position + key));
            __mmask16 visible = _mm512_cmple_epi32_mask(place, places);
            if (window)
                visible &= _mm512_cmpgt_epi32_mask(place, _mm512_sub_epi32(places, _mm512_set1_epi32((int32_t)window)));
            _mm512_store_ps(s[key], _mm512_mask_mov_ps(hidden, visible, _mm512_load_ps(s[key])));
        }
    for (int64_t key = seen; key < count; key++) _mm512_store_ps(s[key], hidden);
    __m512 top[2] = {hidden, hidden};
    for (int64_t key = 0; key < count; key += 2) {
        top[0] = _mm512_max_ps(top[0], _mm512_load_ps(s[key]));
        top[1] = _mm512_max_ps(top[1], _mm512_load_ps(s[key + 1]));
    }
    const __m512 now = _mm512_max_ps(peak, _mm512_mul_ps(_mm512_max_ps(top[0], top[1]), scale));
    if (_mm512_cmp_ps_mask(now, peak, _CMP_NEQ_UQ)) {
        const __m512 shrunk = exp2(_mm512_sub_ps(peak, now));
        alignas(64) float factors[16];
        _mm512_store_ps(factors, shrunk);
        for (int64_t query = 0; query < 16; query++)
            for (int64_t d = 0; d < dim; d += 16) {
                float* at = my.out[tile] + query * dim + d;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(factors[query])));
            }
        sum = _mm512_mul_ps(sum, shrunk);
        peak = now;
    }
    alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(PAIRS);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t key = 0; key < count; key += 32) {
        __m512i pairs[16];
        for (int64_t i = 0; i < 16; i++) {
            const __m512 even = exp2(_mm512_fmsub_ps(_mm512_load_ps(s[key + 2 * i]), scale, peak));
            const __m512 odd = exp2(_mm512_fmsub_ps(_mm512_load_ps(s[key + 2 * i + 1]), scale, peak));
            sums[0] = _mm512_add_ps(sums[0], even);
            sums[1] = _mm512_add_ps(sums[1], odd);
            pairs[i] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        }
        transpose(pairs, my.probs[tile][key / 32]);
    }
    sum = _mm512_add_ps(sum, _mm512_add_ps(sums[0], sums[1]));
}

// out += P V for a tile of queries and `count` keys
void mix(int64_t tile, int64_t count, int64_t dim, Scratch& my) {
    const int64_t stride = dim * 4;
    for (int64_t d = 0; d < dim; d += 64) {
        const bool four = d + 32 < dim;
        float* out = my.out[tile] + d;
        _tile_loadd(0, out, stride);
        _tile_loadd(1, out + 16, stride);
        if (four) {
            _tile_loadd(2, out + 32, stride);
            _tile_loadd(3, out + 48, stride);
        }
        for (int64_t key = 0; key < count; key += 32) {
            const uint32_t* values = &my.values[key / 2 * dim + d];
            _tile_loadd(4, my.probs[tile][key / 32], 64);
            _tile_loadd(6, values, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + 16, stride);
            _tile_dpbf16ps(1, 4, 7);
            if (four) {
                _tile_loadd(6, values + 32, stride);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(7, values + 48, stride);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, out, stride);
        _tile_stored(1, out + 16, stride);
        if (four) {
            _tile_stored(2, out + 32, stride);
            _tile_stored(3, out + 48, stride);
        }
    }
}

// q: [rows][heads * dim]; out: the same as tiled inputs
void attend(const Shape& shape, const QueryBlock& block, const Cache& cache, const bf16* base, const Run* runs,
            int64_t window, const bf16* q, bf16* out, Scratch& my) {
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads, width = shape.heads * dim;
    const int64_t tiles = (block.rows + 15) / 16;
    const Sequence& sequence = *block.sequence;
    const auto row_of = [&](int64_t query) { return sequence.row + (block.first + query) / group; };
    const auto column_of = [&](int64_t query) { return (block.kv_head * group + (block.first + query) % group) * dim; };
    __m512 peak[QUERY_TILES], sum[QUERY_TILES];
    for (int64_t tile = 0; tile < tiles; tile++) {
        peak[tile] = _mm512_set1_ps(HIDDEN_MAX);
        sum[tile] = _mm512_setzero_ps();
        const bf16* lanes[16];
        for (int64_t lane = 0; lane < 16; lane++) {
            const int64_t query = min(tile * 16 + lane, block.rows - 1);  // lanes beyond the last query repeat it
            my.places[tile][lane] = (int32_t)(sequence.position + (block.first + query) / group);
            lanes[lane] = q + row_of(query) * width + column_of(query);
        }
        for (int64_t d = 0; d < dim / 32; d++) {
            __m512i pairs[16];
            for (int64_t lane = 0; lane < 16; lane++) pairs[lane] = _mm512_loadu_si512(lanes[lane] + d * 32);
            transpose(pairs, my.queries[tile][d]);
        }
        std::memset(my.out[tile], 0, 16 * dim * 4);
    }
    const int64_t first_place = sequence.position + block.first / group;
    const int64_t stop = sequence.position + (block.first + block.rows - 1) / group + 1;
    const int64_t start = window ? std::max<int64_t>(0, first_place - window + 1) : 0;
    const __m512 scale = _mm512_set1_ps((float)(shape.scale * 1.4426950408889634));
    const bf16* keys = base + block.kv_head * cache.head_stride;
    const bf16* values = base + (shape.kv_heads + block.kv_head) * cache.head_stride;
    int64_t position = 0;
    for (int64_t run = sequence.first_run; run < sequence.first_run + sequence.runs; run++) {
        for (int64_t at = 0; at < runs[run].tokens; at += KEYS) {
            const int64_t here = position + at, left = runs[run].tokens - at;
            const int64_t seen = min(min(left, KEYS), stop - here);
            if (seen <= 0 || here + seen <= start) continue;
            const int64_t count = (seen + 31) / 32 * 32, row = (runs[run].row + at) * cache.row_stride;
            score(keys + row, cache.row_stride, left, (seen + 15) / 16 * 16, dim, tiles, my);
            interleave(values + row, cache.row_stride, seen, count, dim, my);
            for (int64_t tile = 0; tile < tiles; tile++) {
                soften(tile, here, seen, count, window, dim, scale, peak[tile], sum[tile], my);
                mix(tile, count, dim, my);
            }
        }
        position += runs[run].tokens;
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
        alignas(64) float share[16];
        _mm512_store_ps(share, _mm512_div_ps(_mm512_set1_ps(1.0f), sum[tile]));
        for (int64_t lane = 0; lane < min<int64_t>(16, block.rows - tile * 16); lane++)
            for (int64_t d = 0; d < dim; d += 16)
                store(out + place(row_of(tile * 16 + lane), column_of(tile * 16 + lane) + d, width),
                      _mm512_mul_ps(_mm512_load_ps(my.out[tile] + lane * dim + d), _mm512_set1_ps(share[lane])));
    }
}

// ---- the layers ----

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
std::unique_ptr<T[], Free> aligned(int64_t count) {
    return std::unique_ptr<T[], Free>((T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}

inline int64_t padded(int64_t rows) { return (rows + 31) / 32 * 32; }

// The threads' places for widened panels, where there are any; `slots` pairs of panels of up to k_tiles tiles.
class WideRoom {
  public:
    WideRoom(bool any, int64_t rows, int64_t k_tiles, int64_t slots, int64_t threads)
        : slot_(rows > 32 ? 2 * k_tiles * TILE : 0), bytes_(any ? (slot_ ? slots * slot_ : 2 * SPAN * TILE) : 0),
          room_(any ? aligned<uint8_t>(threads * bytes_) : nullptr) {}
    bool there() const { return !bytes_ || room_; }
    Wide of(int64_t thread) const { return {room_.get() + thread * bytes_, slot_, {}}; }

  private:
    int64_t slot_, bytes_;
    std::unique_ptr<uint8_t[], Free> room_;
};

inline __m512 with_bias(const float* c, const bf16* bias, int64_t column) {
    const __m512 v = _mm512_loadu_ps(c);
    return bias ? _mm512_add_ps(v, load(bias + column)) : v;
}

// An adapter in a batch: which rows of every 32 are its own, bit by bit, and A x for them.
struct Active {
    const Updates* layers;
    std::vector<uint32_t> own;
    std::vector<int64_t> blocks;       // of 32 rows that have one of its own
    std::unique_ptr<bf16[], Free> low;  // [rows / 16][chunks][LOW_CHUNK]
};

// The adapters of a batch; adapter_of: [rows] an index into `adapters` or -1, or null.
std::vector<Active> active_adapters(const int64_t* adapter_of, int64_t rows, const Adapter* adapters, int64_t count) {
    std::vector<Active> found;
    if (!adapter_of) return found;
    for (int64_t index = 0; index < count; index++) {
        Active active{adapters[index].layers, std::vector<uint32_t>(padded(rows) / 32), {}, nullptr};
        for (int64_t row = 0; row < rows; row++)
            if (adapter_of[row] == index) active.own[row / 32] |= 1u << row % 32;
        for (int64_t block = 0; block < (int64_t)active.own.size(); block++)
            if (active.own[block]) active.blocks.push_back(block);
        if (active.blocks.empty()) continue;
        active.low = aligned<bf16>(padded(rows) / 16 * adapters[index].chunks * LOW_CHUNK);
        found.push_back(std::move(active));
    }
    return found;
}

}  // namespace

extern "C" {

// 0 when this process may use AMX.
int stockade_init() { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

// out [rows][n] = (x, or its RMS norm) [rows][k] times the packed matrix, plus its bias. -1: no memory.
int stockade_linear(const bf16* x, int64_t rows, int64_t k, const bf16* norm, double eps, const Matrix* matrix, int64_t n,
                    bf16* out, int64_t threads) {
    const auto input = aligned<bf16>(padded(rows) * k);
    if (!input) return -1;
    const int64_t panels = (n + 15) / 16, k_tiles = k / 32;
    const WideRoom wide_room(matrix->scales, rows, k_tiles, 1, threads);
    if (!wide_room.there()) return -1;
    Stage stages[2];
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float c[32 * 32];
        Wide wide = wide_room.of(omp_get_thread_num());
        share(stages[0], rows, threads, [&](int64_t row) {
            if (norm)
                rms_norm(x + row * k, norm, k, (float)eps, input.get(), row);
            else
                for (int64_t i = 0; i < k; i += 32) std::memcpy(&input[place(row, i, k)], x + row * k + i, 64);
        });
        configure(min<int64_t>(rows, 16));
        const auto columns = [&](int64_t task, int64_t first, int64_t count) {
            const int64_t second = min(2 * task + 1, panels - 1);
            multiply(&input[first * k], count, panel_of(*matrix, 2 * task, k_tiles),
                     panel_of(*matrix, second, k_tiles), k_tiles, c, 32, wide);
            for (int64_t row = 0; row < count; row++)
                for (int64_t half = 0; half < 2; half++) {
                    const int64_t column = task * 32 + half * 16;
                    if (column >= n) break;
                    const __mmask16 mask = (__mmask16)(n - column >= 16 ? 0xffff : (1 << (n - column)) - 1);
                    __m512 v = _mm512_load_ps(c + row * 32 + half * 16);
                    if (matrix->bias) {
                        const __m256i b = _mm256_maskz_loadu_epi16(mask, matrix->bias + column);
                        v = _mm512_add_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
                    }
                    _mm256_mask_storeu_epi16(out + (first + row) * n + column, mask, (__m256i)_mm512_cvtneps_pbh(v));
                }
        };
        share_blocks(stages[1], rows, (panels + 1) / 2, threads, matrix->scales, columns);
        _tile_release();
    }
    return 0;
}

// Runs layers [first, last) over x [rows][hidden] in place, and stores the new keys and values at write_rows.
// cos, sin: [rows][dim]. sequences: in the order of their rows, which they cover. adapter_of: [rows] an index into
// `adapters`, -1 for none, or null. wanted: [rows] whether layer last - 1 must finish the row, or null: all of them.
// A row that is pooled must be wanted. -1: no memory, -2: a row or a slot out of range.
int stockade_layers(const Shape* shape_, const Layer* layers, int64_t first, int64_t last, bf16* x, int64_t rows,
                    const bf16* cos, const bf16* sin, const int64_t* write_rows, const Cache* caches,
                    const Sequence* sequences, int64_t count, const Run* runs, const int64_t* adapter_of,
                    const Adapter* adapters, int64_t adapter_count, const uint8_t* wanted, const Pool* pools,
                    int64_t pool_count, int64_t threads) {
    const Shape shape = *shape_;
    const int64_t hidden = shape.hidden, dim = shape.dim, ffn = shape.ffn, width = shape.heads * dim;
    const int64_t group = shape.heads / shape.kv_heads, query_heads = shape.heads, key_heads = shape.kv_heads;
    const float eps = (float)shape.eps;
    std::vector<const Cache*> cache_of(rows);
    std::vector<QueryBlock> blocks;
    for (int64_t i = 0; i < count; i++) {
        const Sequence& s = sequences[i];
        const Cache& cache = caches[s.cache];
        int64_t tokens = 0;
        for (int64_t run = s.first_run; run < s.first_run + s.runs; run++) {
            if (runs[run].row < 0 || runs[run].row + runs[run].tokens > cache.rows) return -2;
            tokens += runs[run].tokens;
        }
        if (s.row < 0 || s.row + s.count > rows || tokens != s.position + s.count) return -2;
        for (int64_t row = s.row; row < s.row + s.count; row++) {
            if (write_rows[row] < 0 || write_rows[row] >= cache.rows) return -2;
            cache_of[row] = &cache;
        }
        for (int64_t head = 0; head < key_heads; head++)
            for (int64_t at = 0; at < s.count * group; at += 16 * QUERY_TILES)
                blocks.push_back({&s, head, at, min(16 * QUERY_TILES, s.count * group - at)});
    }
    if (std::find(cache_of.begin(), cache_of.end(), nullptr) != cache_of.end()) return -2;
    for (const Pool* pool = pools; pool < pools + pool_count; pool++)
        for (int64_t row = 0; row < rows; row++)
            if (pool->slot_of[row] < -1 || pool->slot_of[row] >= pool->slots) return -2;
    const int64_t room = padded(rows);
    const bool few = rows <= 16;  // so few that every thread norms them all for itself
    const auto normed = aligned<bf16>(room * hidden * (few ? threads : 1)), q = aligned<bf16>(room * width);
    const auto mixed = aligned<bf16>(room * width), wide = aligned<bf16>(room * ffn);
    const auto scratch = aligned<Scratch>(threads);
    const std::vector<Active> actives = active_adapters(adapter_of, rows, adapters, adapter_count);
    if (!normed || !q || !mixed || !wide || !scratch) return -1;
    for (const Active& active : actives)
        if (!active.low) return -1;
    const bool widened = last > first && layers[first].qkv.scales;
    const WideRoom wide_room(widened, rows, std::max({hidden, width, ffn}) / 32, dim / 32, threads);
    if (!wide_room.there()) return -1;
    const int64_t tile_rows = min<int64_t>(rows, 16), hidden_tiles = hidden / 32;
    std::vector<Stage> stages(11 * (last - first) + pool_count);
#pragma omp parallel num_threads(threads)
    {
        Scratch& my = scratch[omp_get_thread_num()];
        Wide held = wide_room.of(omp_get_thread_num());
        bf16* own = few ? &normed[omp_get_thread_num() * room * hidden] : normed.get();
        Stage* stage = stages.data();
        const bf16* normed_for = nullptr;  // the weight of the norm that `own` holds
        const auto norm_rows = [&](const bf16* weight, int64_t from, int64_t to) {
            for (int64_t row = from; row < to; row++)
                rms_norm(x + row * hidden, weight, hidden, eps, own, row);
        };
        int64_t number = first;
        // Whether somebody wants one of these rows after layer `number`.
        const auto needed = [&](int64_t from, int64_t some) {
            return !wanted || number < last - 1 || std::memchr(wanted + from, 1, some);
        };
        const auto norm = [&](const bf16* weight) {
            if (!few) share(*stage++, rows, threads, [&](int64_t row) { norm_rows(weight, row, row + 1); });
        };
        // only with a unit in hand x stands still
        const auto norm_once = [&](const bf16* weight) {
            if (few && normed_for != weight) norm_rows(weight, 0, rows);
            normed_for = weight;
        };
        // A x for the rows of adapters; x is `input` [rows][k], where it is a norm the one with this weight
        const auto shrink = [&](Update Updates::* map, const bf16* input, int64_t k, const bf16* weight) {
            const auto units_of = [&](const Active& active) {
                return (int64_t)active.blocks.size() * (active.layers[number].*map).chunks;
            };
            int64_t units = 0;
            for (const Active& active : actives) units += units_of(active);
            if (!units) return;
            share(*stage++, units, threads, [&](int64_t unit) {
                const Active* active = actives.data();
                for (; unit >= units_of(*active); active++) unit -= units_of(*active);
                const Update& update = active->layers[number].*map;
                const int64_t from = active->blocks[unit / update.chunks] * 32, some = min<int64_t>(32, rows - from);
                const int64_t chunk = unit % update.chunks;
                if (map != &Updates::qkv && !needed(from, some)) return;
                if (weight) norm_once(weight);
                const uint8_t* w = update.a + 2 * chunk * (k / 32) * TILE;
                multiply(input + from * k, some > 16, w, w + k / 32 * TILE, k / 32, my.c, 32);
                for (int64_t row = 0; row < some; row++) {
                    const float* c = my.c + row * 32;
                    const __m512 sum = _mm512_add_ps(_mm512_load_ps(c), _mm512_load_ps(c + 16));
                    bf16* out = &active->low[((from + row) / 16 * update.chunks + chunk) * LOW_CHUNK + row % 16 * 32];
                    store(out, sum);
                    store(out + 16, sum);
                    const __m512 rest = _mm512_sub_ps(sum, load(out));
                    store(out + LOW_CHUNK / 2, rest);
                    store(out + LOW_CHUNK / 2 + 16, rest);
                }
            });
        };
        // c [some rows][width], 32 columns of the output of a map from `panel` on (of gate and up, 16 of each): adds
        // B (A x). A row's sum is the same whoever is beside it.
        const auto adapt = [&](Update Updates::* map, int64_t panel, int64_t from, int64_t some, float* c,
                               int64_t width) {
            for (const Active& active : actives) {
                const uint32_t own = active.own[from / 32];
                const Update& update = active.layers[number].*map;
                if (!own || !update.chunks) continue;
                const bool both = map == &Updates::wide, all = own == ~0u >> (32 - some);
                const int64_t chunks = both ? update.chunks / 2 : update.chunks;
                const bf16* low = &active.low[from / 16 * update.chunks * LOW_CHUNK];
                const uint8_t* b = update.b + panel * update.chunks * TILE;
                expand(low, both ? low + chunks * LOW_CHUNK : low, update.chunks * LOW_CHUNK, some > 16, b,
                       b + chunks * TILE, chunks, c, width, all ? c : my.adapted, all ? width : 32);
                for (uint32_t left = all ? 0 : own; left; left &= left - 1) {
                    const int64_t row = __builtin_ctz(left);
                    std::memcpy(c + row * width, my.adapted + row * 32, 32 * 4);
                }
            }
        };
        // x += input times matrix
        const auto add_to_x = [&](const bf16* input, const Matrix& matrix, Update Updates::* map, int64_t k) {
            shrink(map, input, k, nullptr);
            share_blocks(*stage++, rows, hidden / 32, threads, widened, [&](int64_t block, int64_t from, int64_t some) {
                if (!needed(from, some)) return;
                multiply(input + from * k, some, panel_of(matrix, 2 * block, k / 32),
                         panel_of(matrix, 2 * block + 1, k / 32), k / 32, my.c, 32, held);
                adapt(map, 2 * block, from, some, my.c, 32);
                for (int64_t row = 0; row < some; row++)
                    for (int64_t half = 0; half < 32; half += 16) {
                        bf16* at = x + (from + row) * hidden + block * 32 + half;
                        const __m512 sum = with_bias(my.c + row * 32 + half, matrix.bias, block * 32 + half);
                        store(at, _mm512_add_ps(load(at), sum));
                    }
            });
        };
        configure(tile_rows);
        for (; number < last; number++) {
            const Layer& layer = layers[number];
            norm(layer.input_norm);
            shrink(&Updates::qkv, own, hidden, layer.input_norm);
            const int64_t all_heads = query_heads + 2 * key_heads;
            share_blocks(*stage++, rows, all_heads, threads, widened, [&](int64_t head, int64_t from, int64_t some) {
                norm_once(layer.input_norm);
                for (int64_t column = 0; column < dim; column += 32) {
                    const int64_t panel = (head * dim + column) / 16;
                    multiply(own + from * hidden, some, panel_of(layer.qkv, panel, hidden_tiles),
                             panel_of(layer.qkv, panel + 1, hidden_tiles), hidden_tiles, my.c + column, dim, held,
                             column / 32);
                    adapt(&Updates::qkv, panel, from, some, my.c + column, dim);
                }
                for (int64_t row = 0; row < some; row++) {
                    float* c = my.c + row * dim;
                    const int64_t at = from + row, key_head = head - query_heads;
                    if (layer.qkv.bias)
                        for (int64_t i = 0; i < dim; i += 16)
                            _mm512_storeu_ps(c + i, with_bias(c + i, layer.qkv.bias, head * dim + i));
                    const Cache& cache = *cache_of[at];
                    bf16* out = key_head < 0 ? &q[at * width + head * dim]
                                             : cache.layers[number] + key_head * cache.head_stride +
                                                   write_rows[at] * cache.row_stride;
                    if (key_head < key_heads)
                        finish_head(c, dim, key_head < 0 ? layer.q_norm : layer.k_norm, eps, cos + at * dim,
                                    sin + at * dim, out);
                    else
                        for (int64_t i = 0; i < dim; i += 16) store(out + i, _mm512_loadu_ps(c + i));
                }
            });
            if (tile_rows < 16) configure(16);
            share(*stage++, (int64_t)blocks.size(), threads, [&](int64_t i) {
                const QueryBlock& block = blocks[i];
                const int64_t from = block.first / group, to = (block.first + block.rows - 1) / group;
                if (!needed(block.sequence->row + from, to - from + 1)) return;
                const Cache& cache = caches[block.sequence->cache];
                attend(shape, block, cache, cache.layers[number], runs, layer.window, q.get(), mixed.get(), my);
            });
            if (tile_rows < 16) configure(tile_rows);
            add_to_x(mixed.get(), layer.o, &Updates::o, width);
            norm(layer.post_norm);
            shrink(&Updates::wide, own, hidden, layer.post_norm);
            share_blocks(*stage++, rows, ffn / 16, threads, widened, [&](int64_t panel, int64_t from, int64_t some) {
                if (!needed(from, some)) return;
                norm_once(layer.post_norm);
                multiply(own + from * hidden, some, panel_of(layer.gate, panel, hidden_tiles),
                         panel_of(layer.up, panel, hidden_tiles), hidden_tiles, my.c, 32, held);
                adapt(&Updates::wide, panel, from, some, my.c, 32);
                for (int64_t row = 0; row < some; row++) {
                    const __m512 gate = with_bias(my.c + row * 32, layer.gate.bias, panel * 16);
                    const __m512 up = with_bias(my.c + row * 32 + 16, layer.up.bias, panel * 16);
                    store(&wide[place(from + row, panel * 16, ffn)], _mm512_mul_ps(silu(gate), up));
                }
            });
            add_to_x(wide.get(), layer.down, &Updates::down, ffn);
            for (const Pool* pool = pools; pool < pools + pool_count; pool++)
                if (pool->layer == number + 1)
                    // one thread adds a column's rows, in their order
                    share(*stage++, hidden / 16, threads, [&](int64_t part) {
                        for (int64_t row = 0; row < rows; row++) {
                            if (pool->slot_of[row] < 0) continue;
                            float* sum = pool->sums + pool->slot_of[row] * hidden + part * 16;
                            _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), load(x + row * hidden + part * 16)));
                        }
                    });
        }
        _tile_release();
    }
    return 0;
}
}
