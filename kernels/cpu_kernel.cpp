// The relation loss and its gradient on a CPU, one (image, head) at a time, in blocks of 32 query rows: no N x N map.
//
// Of one row i, with s = scale, a = x_t y_t^T and b = x_s y_s^T the products, n the valid tokens, w the weight of the row:
//
//     m = max_j s a_j      e_j = exp(s a_j - m)      l = sum_j e_j                              on both sides
//     row_i = sum_j e_t,j ((s_t a_j - m_t) - (s_s b_j - m_s)) / l_t + log(l_s / l_t)
//     dS_ij = w_i s_s (p_s - p_t)_ij = (e_s,j - e_t,j l_s / l_t) w_i s_s / l_s      dX = dS Y_s      dY = dS^T X_s
//
// l_s / l_t is exactly 1 for equal rows, so their gradient is exactly 0. NaN and infinity reach row_i: nothing here is
// compiled with finite maths. A block of rows stays in the first-level cache from its products to its gradients.
// Vectors are the compiler's own, 64 bytes with AVX-512, 32 with AVX2, else 16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 4;  // 16 registers: 12 sums, 3 columns, a broadcast
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 8;
#endif
constexpr int64_t BLOCK = 32;  // query rows
constexpr int64_t DEPTH = 256; // terms of a sum that are added one by one; more are sums of such sums, which err less
constexpr int64_t PAD = 16;    // columns are padded to multiples of this many numbers, 64 bytes in fp32

#if defined(__FLT16_MAX__) && defined(__FLT16_MANT_DIG__)
#define HAS_FLOAT16 1
typedef _Float16 Half;
#else
#define HAS_FLOAT16 0
typedef float Half;
#endif

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

template <typename T>
struct Lanes {
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int count = VECTOR_BYTES / sizeof(T);
};

// exp(x) for x <= 0, NaN for NaN, 0 where it would be no normal number: 2^n p(r), x = n ln 2 + r, |r| <= ln 2 / 2.
// Adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits.
inline float exp_of(float x) {
    const float capped = x < -87.0f ? -87.0f : x;
    const float shifted = capped * 1.44269504088896341f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (capped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;  // Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return x < -87.0f ? 0.0f : p * power;
}

inline double exp_of(double x) {
    const double capped = x < -708.0 ? -708.0 : x;
    const double shifted = capped * 1.44269504088896340736 + 6755399441055744.0;
    const double n = shifted - 6755399441055744.0;
    const double r = (capped - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;  // Taylor to r^13: 2e-18 at ln 2 / 2
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 1023u) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof(power));
    return x < -708.0 ? 0.0 : p * power;
}

// c[r][:] (+)= sum_k a(r, k) b[k][:], for R rows and C vectors; a(r, k) lies at r * a_row + k * a_k. What is added to
// comes first in the sum, or `last`.
template <typename T, int R, int C>
inline void tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t depth,
                 bool add, bool last) {
    typedef typename Lanes<T>::Vector Vector;
    constexpr int lanes = Lanes<T>::count;
    Vector sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v)
            sums[r][v] = add && !last ? *reinterpret_cast<const Vector*>(c + r * c_row + v * lanes) : Vector{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector columns[C];
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) columns[v] = *reinterpret_cast<const Vector*>(b + k * b_row + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T factor = a[r * a_row + k * a_k];
#pragma GCC unroll 8
            for (int v = 0; v < C; ++v) sums[r][v] += factor * columns[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) {
            Vector* place = reinterpret_cast<Vector*>(c + r * c_row + v * lanes);
            *place = last ? *place + sums[r][v] : sums[r][v];
        }
}

// c (+)= a b: rows a multiple of TILE_ROWS, columns one of PAD.
template <typename T>
void product(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
             int64_t columns, int64_t depth, bool add) {
    constexpr int lanes = Lanes<T>::count;
    int64_t left = columns / lanes;
    for (int64_t j = 0; left > 0;) {
        const int64_t vectors = left >= 5 || left == 3 ? 3 : std::min<int64_t>(left, 2);
        for (int64_t k = 0; k < depth; k += DEPTH) {
            const int64_t terms = std::min(DEPTH, depth - k);
            const T* b_tile = b + k * b_row + j;
            for (int64_t i = 0; i < rows; i += TILE_ROWS) {
                const T* a_tile = a + i * a_row + k * a_k;
                T* c_tile = c + i * c_row + j;
                if (vectors == 3)
                    tile<T, TILE_ROWS, 3>(a_tile, a_row, a_k, b_tile, b_row, c_tile, c_row, terms, add, k > 0);
                else if (vectors == 2)
                    tile<T, TILE_ROWS, 2>(a_tile, a_row, a_k, b_tile, b_row, c_tile, c_row, terms, add, k > 0);
                else
                    tile<T, TILE_ROWS, 1>(a_tile, a_row, a_k, b_tile, b_row, c_tile, c_row, terms, add, k > 0);
            }
        }
        j += vectors * lanes;
        left -= vectors;
    }
}

// The loss of one row from its products a and b, padded to width; both are overwritten, b by its row of dS.
template <typename T>
T softmax_row(T* __restrict a, T* __restrict b, int64_t n, int64_t width, T scale_t, T scale_s, T weight,
              bool want_grad) {
    T m_t = scale_t * a[0], m_s = scale_s * b[0];
#pragma omp simd reduction(max : m_t, m_s)
    for (int64_t j = 0; j < n; ++j) {
        a[j] *= scale_t;
        b[j] *= scale_s;
        m_t = a[j] > m_t ? a[j] : m_t;
        m_s = b[j] > m_s ? b[j] : m_s;
    }
    for (int64_t j = n; j < width; ++j) {  // logits whose exponential is 0, however large the others are
        a[j] = m_t - std::max(T(1e4), std::abs(m_t) / 2);
        b[j] = m_s - std::max(T(1e4), std::abs(m_s) / 2);
    }
    T l_t = 0, l_s = 0, sum = 0;
#pragma omp simd reduction(+ : l_t, l_s, sum)
    for (int64_t j = 0; j < width; ++j) {
        const T y_t = a[j] - m_t, y_s = b[j] - m_s;
        const T e_t = exp_of(y_t), e_s = exp_of(y_s);
        l_t += e_t;
        l_s += e_s;
        sum += e_t * (y_t - y_s);
        a[j] = e_t;
        b[j] = e_s;
    }
    if (want_grad) {
        const T ratio = l_s / l_t, factor = weight * scale_s / l_s;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) b[j] = (b[j] - a[j] * ratio) * factor;
    }
    return static_cast<T>(static_cast<double>(sum) / l_t + std::log(static_cast<double>(l_s) / l_t));
}

// As ctypes passes them; dtype is 0 for fp32, 1 for fp64, 2 for bf16, 3 for fp16; strides are in numbers.
struct Tensor {
    char* data;
    int64_t stride_b, stride_h, stride_n, dtype;
};

struct Problem {
    Tensor x_s, y_s, x_t, y_t, d_x, d_y;  // (B, H, N, D), the last dimension contiguous; no data where not wanted
    char *rows, *weights;                 // (B, H, N) in the working dtype, or null
    const int64_t* lengths;               // (B,), or null
    int64_t num_images, num_heads, num_tokens, width_s, width_t;
    double scale_s, scale_t, gradient_scale;  // the last of the gradient, before it is rounded
    int64_t num_threads;
};

inline char* row_of(const Tensor& z, int64_t b, int64_t h, int64_t i) {
    const int64_t bytes = z.dtype == 0 ? 4 : z.dtype == 1 ? 8 : 2;
    return z.data + (b * z.stride_b + h * z.stride_h + i * z.stride_n) * bytes;
}

template <typename T>
void load_row(const Tensor& z, int64_t b, int64_t h, int64_t i, int64_t width, T* out) {
    const char* row = row_of(z, b, h, i);
    if (z.dtype == 0) {
        for (int64_t d = 0; d < width; ++d) out[d] = static_cast<T>(reinterpret_cast<const float*>(row)[d]);
    } else if (z.dtype == 1) {
        for (int64_t d = 0; d < width; ++d) out[d] = static_cast<T>(reinterpret_cast<const double*>(row)[d]);
    } else if (z.dtype == 2) {
        for (int64_t d = 0; d < width; ++d) {
            const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[d]) << 16;
            float value;
            std::memcpy(&value, &bits, sizeof(value));
            out[d] = static_cast<T>(value);
        }
    } else {
        for (int64_t d = 0; d < width; ++d) out[d] = static_cast<T>(reinterpret_cast<const Half*>(row)[d]);
    }
}

template <typename T>
void store_row(const Tensor& z, int64_t b, int64_t h, int64_t i, int64_t width, T scale, const T* values) {
    char* row = row_of(z, b, h, i);
    if (z.dtype == 0) {
        for (int64_t d = 0; d < width; ++d) reinterpret_cast<float*>(row)[d] = static_cast<float>(values[d] * scale);
    } else if (z.dtype == 1) {
        for (int64_t d = 0; d < width; ++d) reinterpret_cast<double*>(row)[d] = static_cast<double>(values[d] * scale);
    } else if (z.dtype == 2) {
        for (int64_t d = 0; d < width; ++d) {  // to the nearest, ties to even; a NaN stays one
            const float value = static_cast<float>(values[d] * scale);
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof(bits));
            const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
            reinterpret_cast<uint16_t*>(row)[d] = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
        }
    } else {
        for (int64_t d = 0; d < width; ++d) reinterpret_cast<Half*>(row)[d] = static_cast<Half>(values[d] * scale);
    }
}

// What one thread works in, in the working dtype; every part begins at a cache line.
template <typename T>
struct Scratch {
    T *x_s, *y_s, *yt_s, *x_t, *yt_t;  // projections, (N, D), and y transposed, (D, N); padded with zeros
    T *a, *b;                          // products of a block of rows, (BLOCK, N)
    T *d_x, *d_y;                      // (BLOCK, D_s) and (N, D_s)
    int64_t size;

    Scratch(const Problem& p, T* memory) : size(0) {
        const int64_t n = padded(p.num_tokens), s = padded(p.width_s), t = padded(p.width_t);
        const int64_t sizes[] = {n * s, n * s, s * n, n * t, t * n, BLOCK * n, BLOCK * n, BLOCK * s, n * s};
        T** parts[] = {&x_s, &y_s, &yt_s, &x_t, &yt_t, &a, &b, &d_x, &d_y};
        for (int part = 0; part < 9; ++part) {
            *parts[part] = memory ? memory + size : nullptr;
            size += sizes[part];
        }
    }
};

// n rows of a projection, zeros up to a whole tile of rows; and where out_t is given, its transpose instead, n columns.
template <typename T>
void load(const Tensor& z, int64_t b, int64_t h, int64_t n, int64_t num_tokens, int64_t width, T* out, T* out_t) {
    const int64_t columns = padded(width), stride = padded(num_tokens), end = std::min(padded(n), stride);
    for (int64_t i = 0; i < n; ++i) load_row(z, b, h, i, width, out + i * columns);
    std::fill(out + n * columns, out + end * columns, T(0));
    if (!out_t) return;
    for (int64_t i0 = 0; i0 < end; i0 += PAD)
        for (int64_t d = 0; d < width; ++d)
            for (int64_t i = i0; i < i0 + PAD; ++i) out_t[d * stride + i] = out[i * columns + d];
}

template <typename T>
void one_map(const Problem& p, Scratch<T>& s, int64_t b, int64_t h) {
    const int64_t n = p.lengths ? p.lengths[b] : p.num_tokens;
    const int64_t stride = padded(p.num_tokens), width = padded(n), s_width = padded(p.width_s);
    const bool want_x = p.d_x.data, want_y = p.d_y.data, joint = want_x && p.d_x.data == p.d_y.data;
    const int64_t offset = (b * p.num_heads + h) * p.num_tokens;
    T* rows = p.rows ? reinterpret_cast<T*>(p.rows) + offset : nullptr;
    const T scale = T(p.gradient_scale);
    const T* weights = p.weights ? reinterpret_cast<const T*>(p.weights) + offset : nullptr;

    load(p.y_t, b, h, n, p.num_tokens, p.width_t, s.x_t, s.yt_t);  // x_t is its scratch
    load(p.x_t, b, h, n, p.num_tokens, p.width_t, s.x_t, static_cast<T*>(nullptr));
    load(p.y_s, b, h, n, p.num_tokens, p.width_s, s.y_s, s.yt_s);
    load(p.x_s, b, h, n, p.num_tokens, p.width_s, s.x_s, static_cast<T*>(nullptr));
    if (want_y) std::fill(s.d_y, s.d_y + width * s_width, T(0));

    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t count = std::min(BLOCK, n - first);
        const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        const T* x_t = s.x_t + first * padded(p.width_t);
        const T* x_s = s.x_s + first * s_width;
        product(x_t, padded(p.width_t), int64_t(1), s.yt_t, stride, s.a, stride, tiles, width, p.width_t, false);
        product(x_s, s_width, int64_t(1), s.yt_s, stride, s.b, stride, tiles, width, p.width_s, false);
        for (int64_t i = 0; i < count; ++i) {
            const T loss = softmax_row(s.a + i * stride, s.b + i * stride, n, width, T(p.scale_t), T(p.scale_s),
                                       weights ? weights[first + i] : T(1), want_x || want_y);
            if (rows) rows[first + i] = loss;
        }
        if (want_y)
            product(s.b, int64_t(1), stride, x_s, s_width, s.d_y, s_width, width, s_width, count, true);
        if (joint) {
            product(s.b, stride, int64_t(1), s.y_s, s_width, s.d_y + first * s_width, s_width, tiles, s_width, n, true);
        } else if (want_x) {
            product(s.b, stride, int64_t(1), s.y_s, s_width, s.d_x, s_width, tiles, s_width, n, false);
            for (int64_t i = 0; i < count; ++i)
                store_row(p.d_x, b, h, first + i, p.width_s, scale, s.d_x + i * s_width);
        }
    }
    for (int64_t i = n; rows && i < p.num_tokens; ++i) rows[i] = T(0);
    if (want_y)
        for (int64_t i = 0; i < n; ++i) store_row(p.d_y, b, h, i, p.width_s, scale, s.d_y + i * s_width);
    std::fill(s.d_x, s.d_x + s_width, T(0));
    for (int64_t i = n; i < p.num_tokens; ++i) {
        if (want_x) store_row(p.d_x, b, h, i, p.width_s, scale, s.d_x);
        if (want_y) store_row(p.d_y, b, h, i, p.width_s, scale, s.d_x);
    }
}

// 0, or 1 where there is no memory.
template <typename T>
int all_maps(const Problem& p) {
    const int64_t num_maps = p.num_images * p.num_heads, size = Scratch<T>(p, nullptr).size;
    const int num_threads = static_cast<int>(std::min(num_maps, p.num_threads));
    T* memory = static_cast<T*>(std::aligned_alloc(64, num_threads * size * sizeof(T)));
    if (!memory) return 1;
#pragma omp parallel num_threads(num_threads)
    {
        T* mine = memory + omp_get_thread_num() * size;
        std::fill(mine, mine + size, T(0));
        Scratch<T> scratch(p, mine);
#pragma omp for schedule(dynamic)
        for (int64_t map = 0; map < num_maps; ++map) one_map(p, scratch, map / p.num_heads, map % p.num_heads);
    }
    std::free(memory);
    return 0;
}

}  // namespace

extern "C" {

int relation_kl_float32(const Problem* problem) { return all_maps<float>(*problem); }
int relation_kl_float64(const Problem* problem) { return all_maps<double>(*problem); }
int has_float16() { return HAS_FLOAT16; }

}
