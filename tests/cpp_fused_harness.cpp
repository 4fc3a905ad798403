// The fused passes of cpp.direct without Python: a library for ctypes, or with -DHARNESS_MAIN a program.
//
// The program reads problems from standard input, as the integers of `read_problem`, and runs every pass of each in
// both dtypes on buffers of exactly the right size, so that a sanitizer sees any access outside of them. Codes are all
// bytes in turn, possible or not: none may lead outside of a buffer.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "algorithm/pooled_forward.h"
#include "algorithm/sparse_grad_input.h"
#include "algorithm/sparse_grad_weight.h"

namespace {

constexpr int kNumbers = 39;

pvc::PooledProblem read_problem(const int64_t* n, double negative_slope) {
    pvc::PooledProblem pooled = {};
    pvc::ConvProblem& problem = pooled.conv;
    problem.batch = n[0];
    problem.in_channels = n[1];
    problem.out_channels = n[2];
    problem.groups = n[3];
    problem.layout = n[4] != 0 ? pvc::Layout::ndhwc : pvc::Layout::ncdhw;
    problem.source_layout = problem.weight_layout = problem.layout;
    pooled.activation = static_cast<pvc::Activation>(n[5]);
    pooled.negative_slope = negative_slope;
    int64_t* const triples[] = {problem.input_size,    problem.output_size, problem.kernel_size, problem.stride,
                                problem.padding_begin, problem.padding_end, problem.dilation,    pooled.pool_window,
                                pooled.pool_stride,    pooled.pool_padding, pooled.pooled_size};
    n += 6;
    for (int64_t* triple : triples) {
        for (int axis = 0; axis < 3; ++axis) triple[axis] = *n++;
    }
    return pooled;
}

// pass 0, 1, 2: forward (first = x, second = weight), grad_input (grad, weight), grad_weight (grad, x; writes `bias`).
template <typename T>
void run(const pvc::PooledProblem& problem, int pass, const void* first, const void* second, void* bias, void* result,
         uint8_t* code) {
    const T* a = static_cast<const T*>(first);
    const T* b = static_cast<const T*>(second);
    T* to = static_cast<T*>(result);
    if (pass == 0) pvc::pooled_forward<T>(problem, a, b, static_cast<const T*>(bias), to, code);
    if (pass == 1) pvc::sparse_grad_input<T>(problem, a, code, b, to);
    if (pass == 2) pvc::sparse_grad_weight<T>(problem, a, code, b, to, static_cast<T*>(bias));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void run_pass(const int64_t* numbers, double negative_slope,
                                                                int double_precision, int pass, const void* first,
                                                                const void* second, void* bias, void* result,
                                                                uint8_t* code) {
    const pvc::PooledProblem problem = read_problem(numbers, negative_slope);
    if (double_precision != 0) {
        run<double>(problem, pass, first, second, bias, result, code);
    } else {
        run<float>(problem, pass, first, second, bias, result, code);
    }
}

#ifdef HARNESS_MAIN
namespace {

int64_t product(const int64_t* size) { return size[0] * size[1] * size[2]; }

template <typename T>
T* buffer(int64_t count) {
    T* values = static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T)));
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(i % 7 - 3);
    return values;
}

template <typename T>
void run_all(const pvc::PooledProblem& pooled) {
    const pvc::ConvProblem& problem = pooled.conv;
    const int64_t values = problem.batch * problem.out_channels * product(pooled.pooled_size);
    T* x = buffer<T>(problem.batch * problem.in_channels * product(problem.input_size));
    T* y = buffer<T>(values);
    T* weight = buffer<T>(problem.out_channels * problem.in_channels / problem.groups * product(problem.kernel_size));
    T* bias = buffer<T>(problem.out_channels);
    uint8_t* code = buffer<uint8_t>(values);
    pvc::pooled_forward<T>(pooled, x, weight, bias, y, nullptr);
    pvc::pooled_forward<T>(pooled, x, weight, nullptr, y, code);
    for (int round = 0; round < 2; ++round) {
        for (int64_t i = 0; i < values; ++i) y[i] = static_cast<T>(i % 5 - 2);
        pvc::sparse_grad_input<T>(pooled, y, code, weight, x);
        pvc::sparse_grad_weight<T>(pooled, y, code, x, weight, round == 0 ? bias : nullptr);
        for (int64_t i = 0; i < values; ++i) code[i] = static_cast<uint8_t>(i * 37 + 255);
    }
    T* const buffers[] = {x, y, weight, bias};
    for (T* each : buffers) std::free(each);
    std::free(code);
}

}  // namespace

int main() {
    long long number = 0;
    int64_t numbers[kNumbers];
    int read = 0, problems = 0;
    while (std::scanf("%lld", &number) == 1) {
        numbers[read++] = number;
        if (read < kNumbers) continue;
        read = 0;
        const pvc::PooledProblem problem = read_problem(numbers, 0.25);
        run_all<float>(problem);
        run_all<double>(problem);
        ++problems;
    }
    std::printf("%d problems\n", problems);
    return 0;
}
#endif
