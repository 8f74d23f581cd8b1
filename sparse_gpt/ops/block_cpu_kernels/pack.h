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

// Whether blocks are multiplied by panels of outputs and of inputs.
static inline bool by_panel(int32_t outputs, int32_t inputs) {
    return outputs % kPanel == 0 && inputs % kPanel == 0;
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
            for (int i = 0; i < 16; ++i) out[i] = wide(from[i]);
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
            for (int i = 0; i < 16; ++i) to[i] = narrow(in[i]);
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
    for (int u = 0; u < kTile; u += 16)
        for (int64_t f = first; f < last; f += 16) {
            const int count = static_cast<int>(std::min<int64_t>(16, last - f));
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
    for (int t = 0; t < kTile; ++t)
        for (int64_t f = first; f < last; f += 16) {
            float* to = tile + f * kTile + t * 16;
            if (start + t < tokens)
                read_row(m, start + t, f, 16, to);
            else
                std::fill(to, to + 16, 0.0f);
        }
}

// The same in pairs of features; `first` and `last` are even.
static void pack_feature_pairs(const Matrix& m, int64_t start, int64_t tokens, int64_t first,
                               int64_t last, float* tile) {
    alignas(64) float rows[256];
    for (int u = 0; u < kTile; u += 16)
        for (int64_t f = first; f < last; f += 32) {
            const int count = static_cast<int>(std::min<int64_t>(32, last - f));
            for (int i = 0; i < 16; ++i) {
                float* row = rows + 16 * i;
                const int64_t token = start + u + i;
                if (token >= tokens || count < 32) std::fill(row, row + 16, 0.0f);
                if (token >= tokens) continue;
                if (!m.inputs) {
                    const uint16_t* from = static_cast<const uint16_t*>(m.data);
                    std::memcpy(row, from + token * m.stride + f, 2 * count);
                    continue;
                }
                alignas(64) float wide_row[32];
                for (int h = 0; h < 32; h += 16)
                    read_row(m, token, f + h, std::clamp(count - h, 0, 16), wide_row + h);
                for (int p = 0; p < 16; ++p)
                    row[p] = pair_of(narrow(wide_row[2 * p]), narrow(wide_row[2 * p + 1]));
            }
            put(rows, count / 2, tile + f / 2 * kTile + u, kTile);
        }
}

// The token pair start, start + 1 of 16 features.
static inline void read_token_pair(const Matrix& m, int64_t start, int64_t tokens, int64_t f,
                                   int count, float* out) {
    alignas(64) float two[32] = {};
    for (int h = 0; h < 2; ++h)
        if (start + h < tokens) read_row(m, start + h, f, count, two + 16 * h);
    for (int j = 0; j < 16; ++j) out[j] = pair_of(narrow(two[j]), narrow(two[16 + j]));
}

// The same in pairs of tokens.
static void pack_token_pairs(const Matrix& m, int64_t start, int64_t tokens, int64_t first,
                             int64_t last, float* tile) {
    alignas(64) float rows[256];
    for (int u = 0; u < kTile / 2; u += 16)
        for (int64_t f = first; f < last; f += 16) {
            const int count = static_cast<int>(std::min<int64_t>(16, last - f));
            for (int i = 0; i < 16; ++i)
                read_token_pair(m, start + 2 * (u + i), tokens, f, count, rows + 16 * i);
            put(rows, count, tile + f * (kTile / 2) + u, kTile / 2);
        }
}

// The same in panels of 16 features: [features / 16][32][16].
static void pack_pair_panels(const Matrix& m, int64_t start, int64_t tokens, int64_t first,
                             int64_t last, float* tile) {
    for (int t = 0; t < kTile / 2; ++t)
        for (int64_t f = first; f < last; f += 16)
            read_token_pair(m, start + 2 * t, tokens, f, 16, tile + f * (kTile / 2) + t * 16);
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

// sums [rows][64] -> features first .. first + rows of the tokens from `start` on.
// 16 rows behind the last are read, and not used.
static void unpack(const float* sums, int64_t first, int64_t rows, int64_t start, int64_t tokens,
                   const Output& out) {
    alignas(64) float turned[256];
    for (int u = 0; u < kTile && start + u < tokens; u += 16)
        for (int64_t r = 0; r < rows; r += 16) {
            const int count = static_cast<int>(std::min<int64_t>(16, rows - r));
            transpose(sums + r * kTile + u, kTile, turned, 16);
            for (int i = 0; i < 16 && start + u + i < tokens; ++i)
                put_row(turned + 16 * i, start + u + i, first + r, count, out);
        }
}
