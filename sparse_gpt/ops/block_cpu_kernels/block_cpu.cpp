// Linear layers over compact storage on a CPU: y = act(x W^T + b), and its gradients.
//
// Tokens are the vector: inputs are packed into tiles of 64 tokens whose features lie one after
// another (pack.h), so that a weight is a scalar that meets a vector whatever the blocks are
// (multiply.h). Of blocks of multiples of 16 outputs are the vector (panels.h). Every number is
// summed in one thread and in one order: results do not depend on the number of threads (team.h,
// plan.h). Sums are fp32; bf16 is rounded once, on its way out.

#include "plan.h"

namespace {

// One weight, its bias, and what belongs to it. Pointers are null where something is not there or
// not wanted; matrices are row-major and contiguous.
struct Operand {
    const void* values;  // [blocks][b_out][b_in]
    const void* bias;    // [out]
    void* y;             // [tokens][out]
    void* inputs;        // [tokens][out], before the activation: written forward, read backward
    const void* dy;      // [tokens][out]
    void* dvalues;       // [blocks][b_out][b_in]
    void* dbias;         // [out]
    int64_t out, blocks;
    Order forward, backward, gradient;  // of the passes for y, dx and dvalues
};

struct Call {
    const Operand* operands;
    const void* x;  // [tokens][in], rows x_stride apart
    void* dx;       // [tokens][in]
    int64_t tokens, in, x_stride;
    int32_t b_out, b_in;
    int32_t count;  // of operands
    int32_t half;   // everything is bf16, not fp32
    int32_t pairs;  // multiply pairs of bf16
    int32_t activation;
    int32_t threads;
};

Plan plan_of(const Call& call) {
    Plan plan;
    plan.tokens = call.tokens;
    plan.threads = std::max(1, call.threads);
    plan.half = call.half;
    plan.pairs = call.pairs;
    return plan;
}

// A matrix, to be packed for sums over its features, over tokens, or both.
int add_packing(Plan* plan, const Call& call, const Matrix& from, int64_t features,
                bool by_feature, bool by_token) {
    const bool panels = by_panel(call.b_out, call.b_in, call.pairs);
    Packing packing{from, features, panels};
    if (call.pairs) {
        const PairLayout one = panels ? kPanelOrder : kLaneOrder;
        if (by_feature) packing.by_feature = one;
        if (by_token) packing.by_token = one;
    }
    plan->packings.push_back(packing);
    return static_cast<int>(plan->packings.size()) - 1;
}

Term term(Plan* plan, const Call& call, const Operand& o, bool turned, int packing) {
    const Order& order = turned ? o.backward : o.forward;
    const int64_t rows = turned ? call.in / call.b_in : o.out / call.b_out;
    plan->values.push_back({o.values, o.blocks, call.b_out, call.b_in, turned, plan->half,
                            plan->pairs, order, rows});
    return {packing, static_cast<int>(plan->values.size()) - 1};
}

int run(Plan* plan) {
    try {
        plan->run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

// 1 where pairs of bf16 are multiplied by one instruction.
int32_t has_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// Write y, and inputs where asked for, of every operand. 0, or 1 for want of memory.
int32_t forward(const Call* call) {
    Plan plan = plan_of(*call);
    const Matrix x{call->x, call->x_stride, plan.half};
    const int packing = add_packing(&plan, *call, x, call->in, true, false);
    for (int i = 0; i < call->count; ++i) {
        const Operand& o = call->operands[i];
        Product p;
        p.terms.push_back(term(&plan, *call, o, false, packing));
        p.output = {o.y, o.inputs, o.bias, o.out, plan.half, call->activation};
        p.rows = o.out / call->b_out;
        p.b = call->b_out;
        plan.products.push_back(p);
    }
    return run(&plan);
}

// Write dx, and every operand's dvalues and dbias, each where it is asked for.
int32_t backward(const Call* call) {
    Plan plan = plan_of(*call);
    const Matrix x{call->x, call->x_stride, plan.half};
    Product dx;
    dx.output = {call->dx, nullptr, nullptr, call->in, plan.half, kNone};
    dx.rows = call->in / call->b_in;
    dx.b = call->b_in;
    int packed_x = -1;
    for (int i = 0; i < call->count; ++i) {
        const Operand& o = call->operands[i];
        const Matrix dy{o.dy, o.out, plan.half, o.inputs, call->activation};
        const bool sums = o.dvalues || o.dbias;
        if (!call->dx && !sums) continue;
        const int packed = add_packing(&plan, *call, dy, o.out, call->dx != nullptr, sums);
        if (call->dx) dx.terms.push_back(term(&plan, *call, o, true, packed));
        if (!sums) continue;
        if (o.dvalues && packed_x < 0)
            packed_x = add_packing(&plan, *call, x, call->in, false, true);
        plan.sums.push_back({packed, packed_x, o.gradient, o.out / call->b_out, call->b_out,
                             call->b_in, o.blocks, plan.pairs, o.dvalues, o.dbias});
    }
    if (call->dx) plan.products.push_back(dx);
    return run(&plan);
}

}  // extern "C"
