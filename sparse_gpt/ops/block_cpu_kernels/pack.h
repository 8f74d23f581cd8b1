// Between row-major matrices [tokens, features] and tiles of 64 tokens, feature after feature.
//
// A tile holds, of each feature, its tokens side by side: [features][64] floats, or pairs of bf16:
// of features [features / 2][64] for sums over features, of tokens [features][32] for sums over
// tokens. Tokens behind the last one are zeros. Panels hold 16 features token after token.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "lanes.h"

constexpr int kPanel = 16;  // features of a panel

// Whether blocks are multiplied by panels of outputs and of inputs; of pairs, by two at once.
static inline bool by_panel(int32_t outputs, int32_t inputs, bool pairs) {
    const int32_t least = pairs ? 2 * kPanel : kPanel;
    return outputs % least == 0 && inputs % least == 0;
}

// Whether gradients of blocks are found as 4 x 4 sums over tokens.
static inline bool by_quad(int32_t outputs, int32_t inputs, bool pairs) {
    return outputs % 4 == 0 && inputs % 4 == 0 && !by_panel(outputs, inputs, pairs);
}

// A row-major matrix of floats or bf16, and perhaps the pre-activations of the same shape whose
// slope it is to be multiplied by.
struct Matrix {
    const void* data;
    int64_t stride;  // between rows, in numbers
    bool half;       // bf16
    const void* inputs = nullptr;
    int32_t activation = kNone;
};

static inline void read(const void* data, int64_t at, bool half, int count, float* out) {
    if (count < 16) std::fill(out, out + 16, 0.0f);
    if (half) {
        const uint16_t* from = static_cast<const uint16_t*>(data) + at;
        if (count == 16)
            wide_16(from, out);
        else
            for (int i = 0; i < count; ++i) out[i] = wide(from[i]);
    } else {
        const float* from = static_cast<const float*>(data) + at;
        if (count == 16)  // a size that is known is a move or two, no call
            std::memcpy(out, from, 64);
        else
            std::memcpy(out, from, 4 * count);
    }
}

static inline void write(void* data, int64_t at, bool half, int count, const float* in) {
    if (half) {
        uint16_t* to = static_cast<uint16_t*>(data) + at;
        if (count == 16)
            narrow_16(in, to);
        else
            for (int i = 0; i < count; ++i) to[i] = narrow(in[i]);
    } else {
        float* to = static_cast<float*>(data) + at;
        if (count == 16)
            std::memcpy(to, in, 64);
        else
            std::memcpy(to, in, 4 * count);
    }
}

// 16 numbers of a row from `feature` on; zeros behind `count`.
static inline void read_row(const Matrix& m, int64_t token, int64_t feature, int count,
                            float* out) {
    const int64_t at = token * m.stride + feature;
    read(m.data, at, m.half, count, out);
    if (!m.inputs) return;
    float inputs[16];
    read(m.inputs, at, m.half, count, inputs);
    for (int i = 0; i < 16; i += kLanes)
        store(out + i, load(out + i) * slope(load(inputs + i), m.activation));
}

static inline void put(const float* rows, int count, float* tile, int width) {
    alignas(64) float turned[256];
    if (count == 16) return transpose(rows, 16, tile, width);
    transpose(rows, 16, turned, 16);
    for (int i = 0; i < count; ++i) std::memcpy(tile + i * width, turned + 16 * i, 64);
}

// Features first .. last of the tokens from `start` on, into a tile.
static void pack_floats(const Matrix& m, int64_t start, int64_t tokens, int64_t first,
                        int64_t last, float* tile) {
    alignas(64) float rows[256];
    for (int64_t f = first; f < last; f += 16)
        for (int u = 0; u < kTile; u += 16) {
            const int count = static_cast<int>(std::min<int64_t>(16, last - f));
            if (count == 16 && start + u + 16 <= tokens && !m.half && !m.inputs) {
                const float* from = static_cast<const float*>(m.data) + (start + u) * m.stride + f;
                transpose(from, m.stride, tile + f * kTile + u, kTile);
                continue;
            }
            for (int i = 0; i < 16; ++i)
                if (start + u + i < tokens)
                    read_row(m, start + u + i, f, count, rows + 16 * i);
                else
                    std::fill(rows + 16 * i, rows + 16 * i + 16, 0.0f);
            put(rows, count, tile + f * kTile + u, kTile);
        }
}

// The same in panels of 16 features: [features / 16][64][16]. `first` and `last` are multiples.
static void pack_panels(const Matrix& m, int64_t start, int64_t tokens, int64_t first,
                        int64_t last, float* tile) {
    for (int64_t f = first; f < last; f += 16)
        for (int t = 0; t < kTile; ++t) {
            float* to = tile + f * kTile + t * 16;
            if (start + t < tokens)
                read_row(m, start + t, f, 16, to);
            else
                std::fill(to, to + 16, 0.0f);
        }
}

// 32 features of a token as bf16; zeros behind `count`, and behind the last token.
static inline void read_halves(const Matrix& m, int64_t token, int64_t tokens, int64_t feature,
                               int count, uint16_t* out) {
    if (token >= tokens || count < 32) std::memset(out, 0, 64);
    if (token >= tokens) return;
    if (!m.inputs) {
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + token * m.stride + feature;
        if (count == 32)
            std::memcpy(out, from, 64);
        else
            std::memcpy(out, from, 2 * count);
        return;
    }
    alignas(64) float row[16];
    for (int h = 0; h < count; h += 16) {
        read_row(m, token, feature + h, std::min(count - h, 16), row);
        narrow_16(row, out + h);
    }
}

// How pairs lie in a tile. Sums over features take pairs of features: lanes [features / 2][64], or
// panels [features / 16][64][8]. Sums over tokens take pairs of tokens: lanes [features][32], panels
// [features / 16][32][16].
enum PairLayout : int32_t { kNoPairs, kLaneOrder, kPanelOrder };

// 32 tokens x 32 features of bf16 whose rows are `stride` numbers apart, of which `count` features
// are there: into a tile, 16 features or 8 pairs of them at a time.
static inline void pack_square(const uint16_t* rows, int64_t stride, int count, int64_t feature, int token,
                               PairLayout by_feature, float* features, PairLayout by_token,
                               float* token_pairs) {
    constexpr int half = kTile / 2;
    alignas(64) float pairs[2][256];
    if (by_feature == kPanelOrder) {
        float* to = features + feature * half + token * 8;
        for (int h = 0; h < count; h += 16)
            for (int i = 0; i < 32; ++i)
                std::memcpy(to + h * half + i * 8, rows + i * stride + h, 32);
    } else if (by_feature == kLaneOrder) {
        float* to = features + feature / 2 * kTile + token;
        for (int i = 0; i < 32; i += 16)
            if (count == 32) {
                transpose(reinterpret_cast<const float*>(rows + i * stride), stride / 2, to + i, kTile);
            } else {
                transpose(reinterpret_cast<const float*>(rows + i * stride), stride / 2, pairs[0], 16);
                for (int f = 0; f < count / 2; ++f) std::memcpy(to + f * kTile + i, pairs[0] + 16 * f, 64);
            }
    }
    if (by_token == kPanelOrder) {
        float* to = token_pairs + feature * half + token / 2 * 16;
        float* second = count > 16 ? to + 16 * half : pairs[1];
        for (int i = 0; i < 16; ++i)
            zip(rows + 2 * i * stride, rows + (2 * i + 1) * stride, to + 16 * i, second + 16 * i);
    } else if (by_token == kLaneOrder) {
        for (int i = 0; i < 16; ++i)
            zip(rows + 2 * i * stride, rows + (2 * i + 1) * stride, pairs[0] + 16 * i, pairs[1] + 16 * i);
        float* to = token_pairs + feature * half + token / 2;
        put(pairs[0], std::min(count, 16), to, half);
        if (count > 16) put(pairs[1], count - 16, to + 16 * half, half);
    }
}

// The same as bf16, in pairs of features, of tokens, or both. `first` is a multiple of 32, `last`
// even where pairs are of features.
static void pack_pairs(const Matrix& m, int64_t start, int64_t tokens, int64_t first, int64_t last,
                       PairLayout by_feature, float* features, PairLayout by_token,
                       float* token_pairs) {
    alignas(64) uint16_t rows[32][32];
    for (int64_t f = first; f < last; f += 32)
        for (int u = 0; u < kTile; u += 32) {
            const int count = static_cast<int>(std::min<int64_t>(32, last - f));
            const uint16_t* from = static_cast<const uint16_t*>(m.data) + (start + u) * m.stride + f;
            int64_t stride = m.stride;
            if (m.inputs || count < 32 || start + u + 32 > tokens || stride % 2) {
                for (int i = 0; i < 32; ++i) read_halves(m, start + u + i, tokens, f, count, rows[i]);
                from = rows[0], stride = 32;
            }
            pack_square(from, stride, count, f, u, by_feature, features, by_token, token_pairs);
        }
}

// What a product becomes on its way out.
struct Output {
    void* y;         // row-major [tokens, features]
    void* inputs;    // before the activation, or null
    const void* bias;  // or null
    int64_t stride;
    bool half;
    int32_t activation;
};

// Up to 16 features of a token, from `first` on. `row` is changed.
static inline void put_row(float* row, int64_t token, int64_t first, int count, const Output& out) {
    const int64_t at = token * out.stride + first;
    if (out.bias) {
        alignas(64) float bias[16];
        read(out.bias, first, out.half, count, bias);
        for (int j = 0; j < 16; ++j) row[j] += bias[j];
    }
    if (out.inputs) write(out.inputs, at, out.half, count, row);
    if (out.activation != kNone)
        for (int j = 0; j < 16; j += kLanes)
            store(row + j, activate(load(row + j), out.activation));
    write(out.y, at, out.half, count, row);
}

// rows [tokens][16] + bias, of which `count` features are used.
static inline void put_square(const float* rows, const float* bias, int64_t token, int64_t first,
                              int tokens, int count, const Output& out) {
    alignas(64) float row[16];
    int64_t at = token * out.stride + first;
#if defined(__AVX512F__)
    if (out.half && count == 16) {
        const Vec more = load(bias);
        uint16_t* to = static_cast<uint16_t*>(out.y) + at;
        for (int i = 0; i < tokens; ++i, to += out.stride) narrow_16(load(rows + 16 * i) + more, to);
        return;
    }
#endif
    if (!out.half && count == 16) {
        float* to = static_cast<float*>(out.y) + at;
        for (int i = 0; i < tokens; ++i, to += out.stride)
            for (int j = 0; j < 16; j += kLanes)
                store(to + j, load(rows + 16 * i + j) + load(bias + j));
        return;
    }
    for (int i = 0; i < tokens; ++i, at += out.stride) {
        for (int j = 0; j < 16; j += kLanes)
            store(row + j, load(rows + 16 * i + j) + load(bias + j));
        write(out.y, at, out.half, count, row);
    }
}

// sums [rows][64] -> features first .. first + rows of the tokens from `start` on.
// 16 rows behind the last are read, and not used.
static void unpack(const float* sums, int64_t first, int64_t rows, int64_t start, int64_t tokens,
                   const Output& out) {
    alignas(64) float turned[256], bias[16] = {};
    const bool plain = !out.inputs && out.activation == kNone;
    for (int u = 0; u < kTile && start + u < tokens; u += 16)
        for (int64_t r = 0; r < rows; r += 16) {
            const int count = static_cast<int>(std::min<int64_t>(16, rows - r));
            const int here = static_cast<int>(std::min<int64_t>(16, tokens - start - u));
            transpose(sums + r * kTile + u, kTile, turned, 16);
            if (!plain) {
                for (int i = 0; i < here; ++i)
                    put_row(turned + 16 * i, start + u + i, first + r, count, out);
                continue;
            }
            if (out.bias) read(out.bias, first + r, out.half, count, bias);
            put_square(turned, bias, start + u, first + r, here, count, out);
        }
}
