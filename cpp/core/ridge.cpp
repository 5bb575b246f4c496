#include "core/ridge.h"

#include <algorithm>
#include <cmath>

namespace laprox {

// Sizes for which a block's rows stay in a processor's caches; results don't depend on them but for rounding.
static const int64_t block = 48;  // columns of L that are made at a time
static const int64_t sides = 16;  // right sides that are solved at a time

// out[i][j] -= a[i] . b[j] for 4 rows a and 2 rows b, which lie apart by n and n_out. In independent sums, which a compiler turns into
// vector instructions without reordering anything.
static void subtract_products(double * out, const double * a, const double * b, int64_t n, int64_t length) {
    double sums[4][2][2] = {};
    int64_t k = 0;
    for (; k + 2 <= length; k += 2) {
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 2; j++) {
                for (int lane = 0; lane < 2; lane++) {
                    sums[i][j][lane] += a[i*n + k + lane]*b[j*n + k + lane];
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) {
            double sum = sums[i][j][0] + sums[i][j][1];
            if (k < length) {
                sum += a[i*n + k]*b[j*n + k];
            }
            out[i*n + j] -= sum;
        }
    }
}

static double dot(const double * a, const double * b, int64_t n) {
    double sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        for (int64_t j = 0; j < 4; j++) {
            sums[j] += a[i + j]*b[i + j];
        }
    }
    for (; i < n; i++) {
        sums[i % 4] += a[i]*b[i];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The lower triangle of a matrix becomes L, of L L^T: block by block of columns, so that what is read again is near.
static void factorise(double * lower, int64_t n, double least) {
    for (int64_t j0 = 0; j0 < n; j0 += block) {
        const int64_t j1 = std::min(j0 + block, n);
        int64_t i = j0;
        for (; i + 4 <= n; i += 4) { // what the columns before take away; above the diagonal it is of no meaning
            int64_t j = j0;
            for (; j + 2 <= j1; j += 2) {
                subtract_products(lower + i*n + j, lower + i*n, lower + j*n, n, j0);
            }
            for (; j < j1; j++) {
                for (int64_t row = i; row < i + 4; row++) {
                    lower[row*n + j] -= dot(lower + row*n, lower + j*n, j0);
                }
            }
        }
        for (; i < n; i++) {
            for (int64_t j = j0; j < j1; j++) {
                lower[i*n + j] -= dot(lower + i*n, lower + j*n, j0);
            }
        }
        for (i = j0; i < n; i++) {
            double * row = lower + i*n;
            for (int64_t j = j0; j < std::min(i, j1); j++) {
                row[j] = (row[j] - dot(row + j0, lower + j*n + j0, j - j0))/lower[j*n + j];
            }
            if (i < j1) {
                // rounding of a float32 gram can't take away more than a part of the ridge
                row[i] = std::sqrt(std::max(row[i] - dot(row + j0, row + j0, i - j0), least));
            }
        }
    }
}

// L L^T x = b for some right sides at once: x[n][sides], b before.
static void substitute(const double * lower, int64_t n, double * x) {
    const auto minus = [](double * to, double factor, const double * from) {
        for (int64_t side = 0; side < sides; side++) {
            to[side] -= factor*from[side];
        }
    };
    const auto divide = [](double * by, double divisor) {
        for (int64_t side = 0; side < sides; side++) {
            by[side] /= divisor;
        }
    };
    for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < i; k++) {
            minus(x + i*sides, lower[i*n + k], x + k*sides);
        }
        divide(x + i*sides, lower[i*n + i]);
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        divide(x + i*sides, lower[i*n + i]);
        for (int64_t k = 0; k < i; k++) {
            minus(x + k*sides, lower[i*n + k], x + i*sides);
        }
    }
}

std::vector<float> solve_ridge(const std::vector<float> & gram, int64_t n, double ridge, const std::vector<float> & right) {
    std::vector<double> lower(gram.begin(), gram.end());
    for (int64_t i = 0; i < n; i++) {
        lower[i*n + i] += ridge;
    }
    factorise(lower.data(), n, ridge*1e-3);

    const int64_t n_right = (int64_t) right.size()/n;
    std::vector<float>  result(right.size());
    std::vector<double> x(n*sides);
    for (int64_t first = 0; first < n_right; first += sides) {
        const int64_t n_now = std::min(sides, n_right - first);
        for (int64_t i = 0; i < n; i++) {
            for (int64_t side = 0; side < n_now; side++) {
                x[i*sides + side] = right[(first + side)*n + i];
            }
        }
        substitute(lower.data(), n, x.data());
        for (int64_t side = 0; side < n_now; side++) {
            for (int64_t i = 0; i < n; i++) {
                result[(first + side)*n + i] = (float) x[i*sides + side];
            }
        }
    }
    return result;
}

}
