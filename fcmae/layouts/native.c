/* A 7x7 depthwise convolution of visible sites, and the gradient of its weight over packed rows; channels last.
   Compiled by native.py. */

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
          else if (c + BLOCK / 2 == channels)
            add_line(into, g, seen, side, first, width, channels, BLOCK / 2);
          else
            add_line(into, g, seen, side, first, width, channels, channels - c);
        }
    }
}

#ifdef __AVX__
#define LANES 8 /* channels of a vector: no more than a register has, or sums would be kept in memory */
#else
#define LANES 4
#endif
#define SITES 4 /* outputs side by side, whose sums stay in registers */

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* A visible site in the window of some outputs side by side. */
typedef struct {
  int64_t place; /* in the features, in floats */
  int64_t dy;    /* its line of the window, 0..6 */
  int64_t dx;    /* its column of the first output's window; of output s, dx - s */
} Seen;

/* out[s][c] = bias[c] + the sum over the sites seen of f[site][c] * taps[dy][dx - s][c], for num vectors of channels
   and num_sites outputs. Both numbers are known where this is compiled into a caller, so that sums are registers. */
static inline __attribute__((always_inline)) void sum_lanes(const Seen *seen, int64_t num_seen, const float *f,
                                                            const float *taps, const float *bias, float *out,
                                                            int64_t channels, int num, int num_sites) {
  Lanes sums[SITES][2], in[2];
  for (int s = 0; s < num_sites; s++)
    for (int k = 0; k < num; k++) sums[s][k] = bias ? *(const Lanes *)(bias + k * LANES) : (Lanes){0};
  for (int64_t i = 0; i < num_seen; i++) {
    const int64_t dx = seen[i].dx;
    const float *tap = taps + (seen[i].dy * SIZE + dx) * channels;
    for (int k = 0; k < num; k++) in[k] = *(const Lanes *)(f + seen[i].place + k * LANES);
#pragma GCC unroll 4
    for (int s = 0; s < num_sites; s++)
      if (dx - s >= 0 && dx - s < SIZE)
        for (int k = 0; k < num; k++) sums[s][k] += in[k] * *(const Lanes *)(tap - s * channels + k * LANES);
  }
  for (int s = 0; s < num_sites; s++)
    for (int k = 0; k < num; k++) *(Lanes *)(out + s * channels + k * LANES) = sums[s][k];
}

/* All channels of num_sites outputs side by side. */
static inline __attribute__((always_inline)) void sum_sites(const Seen *seen, int64_t num_seen, const float *f,
                                                            const float *taps, const float *bias, float *out,
                                                            int64_t channels, int num_sites) {
  int64_t c = 0;
  for (; c + 2 * LANES <= channels; c += 2 * LANES)
    sum_lanes(seen, num_seen, f + c, taps + c, bias ? bias + c : 0, out + c, channels, 2, num_sites);
  for (; c + LANES <= channels; c += LANES)
    sum_lanes(seen, num_seen, f + c, taps + c, bias ? bias + c : 0, out + c, channels, 1, num_sites);
  for (; c < channels; c++)
    for (int s = 0; s < num_sites; s++) {
      float sum = bias ? bias[c] : 0;
      for (int64_t i = 0; i < num_seen; i++) {
        const int64_t dx = seen[i].dx - s;
        if (dx >= 0 && dx < SIZE) sum += f[seen[i].place + c] * taps[(seen[i].dy * SIZE + dx) * channels + c];
      }
      out[s * channels + c] = sum;
    }
}

/* f, out: (num_patches, side, side, channels), the visible patches. taps: (7, 7, channels). bias: (channels) or null.
   visible: the number of each among the patches of all images, of grid_height x grid_width each. slots: by that number
   which visible patch it is, -1 for a hidden one. */
void visible_conv(const float *f, const float *taps, const float *bias, const int64_t *visible, const int64_t *slots,
                  float *out, int64_t num_patches, int64_t side, int64_t grid_height, int64_t grid_width,
                  int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t patch = 0; patch < num_patches; patch++) {
    Seen seen[SIZE * (SITES + SIZE - 1)];
    const int64_t row = visible[patch] / grid_width, image = row / grid_height;
    const int64_t top = row % grid_height * side, left = visible[patch] % grid_width * side;
    for (int64_t oy = 0; oy < side; oy++)
      for (int64_t ox = 0, num_sites; ox < side; ox += num_sites) {
        const int64_t first = left + ox - REACH;
        int64_t num_seen = 0;
        num_sites = ox + SITES <= side ? SITES : ox + 2 <= side ? 2 : 1;
        for (int64_t dy = 0; dy < SIZE; dy++) {
          const int64_t y = top + oy + dy - REACH;
          if (y < 0 || y >= grid_height * side) continue;
          const int64_t *line = slots + (image * grid_height + y / side) * grid_width;
          int64_t x = first < 0 ? 0 : first, end = first + num_sites + SIZE - 1;
          if (end > grid_width * side) end = grid_width * side;
          while (x < end) { /* patch by patch */
            const int64_t column = x / side;
            int64_t next = (column + 1) * side;
            if (next > end) next = end;
            const int64_t sites = (line[column] * side + y % side) * side; /* of the patch's row */
            if (line[column] >= 0)
              for (int64_t i = x; i < next; i++)
                seen[num_seen++] = (Seen){(sites + i % side) * channels, dy, i - first};
            x = next;
          }
        }
        float *to = out + ((patch * side + oy) * side + ox) * channels;
        if (num_sites == SITES)
          sum_sites(seen, num_seen, f, taps, bias, to, channels, SITES);
        else if (num_sites == 2)
          sum_sites(seen, num_seen, f, taps, bias, to, channels, 2);
        else
          sum_sites(seen, num_seen, f, taps, bias, to, channels, 1);
      }
  }
}
