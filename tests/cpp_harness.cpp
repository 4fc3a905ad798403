// The passes of cpp.direct without Python: a library for ctypes, or with -DHARNESS_MAIN a program.
//
// The program reads problems from standard input, as the integers of `read_problem`, and runs every pass of each in
// both dtypes on buffers of exactly the right size, so that a sanitizer sees any access outside of them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "algorithm/direct_forward.h"
#include "algorithm/direct_grad_input.h"
#include "algorithm/direct_grad_weight.h"

namespace {

constexpr int kNumbers = 26;

pvc::ConvProblem read_problem(const int64_t* n) {
    pvc::ConvProblem problem = {};
    problem.batch = n[0];
    problem.in_channels = n[1];
    problem.out_channels = n[2];
    problem.groups = n[3];
    problem.layout = n[4] != 0 ? pvc::Layout::ndhwc : pvc::Layout::ncdhw;
    problem.source_layout = problem.weight_layout = problem.layout;
    int64_t* const triples[] = {problem.input_size,    problem.output_size, problem.kernel_size, problem.stride,
                                problem.padding_begin, problem.padding_end, problem.dilation};
    n += 5;
    for (int64_t* triple : triples) {
        for (int axis = 0; axis < 3; ++axis) triple[axis] = *n++;
    }
    return problem;
}

// pass 0, 1, 2: forward (first = x, second = weight), grad_input (grad_output, weight), grad_weight (grad_output, x).
template <typename T>
void run(const pvc::ConvProblem& problem, int pass, const void* first, const void* second, const void* bias,
         void* result) {
    const T* a = static_cast<const T*>(first);
    const T* b = static_cast<const T*>(second);
    if (pass == 0) pvc::direct_forward<T>(problem, a, b, static_cast<const T*>(bias), static_cast<T*>(result));
    if (pass == 1) pvc::direct_grad_input<T>(problem, a, b, static_cast<T*>(result));
    if (pass == 2) pvc::direct_grad_weight<T>(problem, a, b, static_cast<T*>(result));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void run_pass(const int64_t* numbers, int double_precision, int pass,
                                                                const void* first, const void* second, const void* bias,
                                                                void* result) {
    const pvc::ConvProblem problem = read_problem(numbers);
    if (double_precision != 0) {
        run<double>(problem, pass, first, second, bias, result);
    } else {
        run<float>(problem, pass, first, second, bias, result);
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
void run_all(const pvc::ConvProblem& problem) {
    T* x = buffer<T>(problem.batch * problem.in_channels * product(problem.input_size));
    T* y = buffer<T>(problem.batch * problem.out_channels * product(problem.output_size));
    T* weight = buffer<T>(problem.out_channels * problem.in_channels / problem.groups * product(problem.kernel_size));
    T* bias = buffer<T>(problem.out_channels);
    pvc::direct_forward<T>(problem, x, weight, bias, y);
    pvc::direct_grad_input<T>(problem, y, weight, x);
    pvc::direct_grad_weight<T>(problem, y, x, weight);
    T* const buffers[] = {x, y, weight, bias};
    for (T* each : buffers) std::free(each);
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
        const pvc::ConvProblem problem = read_problem(numbers);
        run_all<float>(problem);
        run_all<double>(problem);
        ++problems;
    }
    std::printf("%d problems\n", problems);
    return 0;
}
#endif
