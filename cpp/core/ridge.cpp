#include "core/ridge.h"

#include <algorithm>
#include <cmath>

namespace laprox {

// In eight sums, which a compiler turns into vector instructions without reordering anything.
static double dot(const double * a, const double * b, int64_t n) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int64_t j = 0; j < 8; j++) {
            sums[j] += a[i + j]*b[i + j];
        }
    }
    for (; i < n; i++) {
        sums[i % 8] += a[i]*b[i];
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

std::vector<float> solve_ridge(const std::vector<float> & gram, int64_t n, double ridge, const std::vector<float> & right) {
    // gram + ridge*I = L L^T, L row by row
    std::vector<double> lower((size_t) n*n);
    for (int64_t i = 0; i < n; i++) {
        double * row = lower.data() + i*n;
        for (int64_t j = 0; j < i; j++) {
            const double * other = lower.data() + j*n;
            row[j] = (gram[i*n + j] - dot(row, other, j))/other[j];
        }
        // rounding of a float32 gram can't take away more than a part of the ridge
        row[i] = std::sqrt(std::max(gram[i*n + i] + ridge - dot(row, row, i), ridge*1e-3));
    }
    std::vector<double> upper((size_t) n*n); // L^T, so that both substitutions go along rows
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            upper[j*n + i] = lower[i*n + j];
        }
    }
    std::vector<float>  result(right.size());
    std::vector<double> x(n);
    for (size_t side = 0; side < right.size()/n; side++) {
        const float * b = right.data() + side*n;
        for (int64_t i = 0; i < n; i++) {
            x[i] = (b[i] - dot(lower.data() + i*n, x.data(), i))/lower[i*n + i];
        }
        for (int64_t i = n - 1; i >= 0; i--) {
            x[i] = (x[i] - dot(upper.data() + i*n + i + 1, x.data() + i + 1, n - i - 1))/upper[i*n + i];
        }
        std::copy(x.begin(), x.end(), result.begin() + side*n);
    }
    return result;
}

}
