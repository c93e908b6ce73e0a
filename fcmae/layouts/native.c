/* The gradient of a 7x7 depthwise convolution's weight over packed rows, channels last. Compiled by native.py. */

#include <stdint.h>

#define SIZE 7
#define REACH 3
#define BLOCK 16 /* channels whose sums for one line of the window stay in registers */

/* One row of sites and one line of the window: sums[dx][c] += grad[s][c] * line[first + s + dx - REACH][c].

   Columns outside of 0..width count as zero. num is the number of channels, at most BLOCK; it is known when this is
   compiled into a caller that passes BLOCK, and the loops over it become vectors. */
static inline __attribute__((always_inline)) void add_line(float *sums, const float *grad, const float *line,
                                                           int64_t side, int64_t first, int64_t width,
                                                           int64_t channels, int64_t num) {
  float kept[SIZE][BLOCK];
  for (int dx = 0; dx < SIZE; dx++)
    for (int64_t c = 0; c < num; c++) kept[dx][c] = sums[dx * channels + c];
  for (int64_t s = 0; s < side; s++) {
    const float *g = grad + s * channels;
    const int64_t x = first + s - REACH;
    const float *seen = line + x * channels;
    if (x >= 0 && x + SIZE <= width) { /* without a test at each column, kept need not leave the registers */
      for (int dx = 0; dx < SIZE; dx++)
        for (int64_t c = 0; c < num; c++) kept[dx][c] += g[c] * seen[dx * channels + c];
    } else {
      for (int dx = 0; dx < SIZE; dx++)
        if (x + dx >= 0 && x + dx < width)
          for (int64_t c = 0; c < num; c++) kept[dx][c] += g[c] * seen[dx * channels + c];
    }
  }
  for (int dx = 0; dx < SIZE; dx++)
    for (int64_t c = 0; c < num; c++) sums[dx * channels + c] = kept[dx][c];
}

/* grad: (num_rows, side, channels), the gradient of the output at the visible pixel rows. canvas: (images * height,
   width, channels), the input, zero at hidden sites. rows: where each row lies in the canvas, cut into rows of `side`
   sites. sums: (parts, 49, channels), zero on entry; part p of it takes an equal share of the rows, so that the result
   is the same at every run. */
void weight_gradient(const float *grad, const float *canvas, const int64_t *rows, float *sums, int64_t num_rows,
                     int64_t side, int64_t height, int64_t width, int64_t channels, int64_t parts) {
#pragma omp parallel for num_threads(parts) schedule(static)
  for (int64_t part = 0; part < parts; part++)
    for (int64_t row = num_rows * part / parts; row < num_rows * (part + 1) / parts; row++) {
      const int64_t line = rows[row] / (width / side), first = rows[row] % (width / side) * side, y = line % height;
      for (int64_t c = 0; c < channels; c += BLOCK)
        for (int dy = 0; dy < SIZE; dy++) {
          if (y + dy < REACH || y + dy - REACH >= height) continue;
          float *into = sums + (part * SIZE * SIZE + dy * SIZE) * channels + c;
          const float *g = grad + row * side * channels + c;
          const float *seen = canvas + (line + dy - REACH) * width * channels + c;
          if (c + BLOCK <= channels)
            add_line(into, g, seen, side, first, width, channels, BLOCK);
          else
            add_line(into, g, seen, side, first, width, channels, channels - c);
        }
    }
}
