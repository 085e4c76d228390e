/* Instantiates every body for every type, for the instruction set that the including file names:
 *     FLORA_ISA            the suffix of the symbols
 *     FLORA_VECTOR_BYTES   the width of a vector
 *     FLORA_REGISTERS      how many vectors the register file holds
 * and defines its table, flora_kernels_<isa>.
 *
 * A body is written in terms of
 *     act, real, vec, LANES     activation and compute type, a vector of reals and how many it holds
 *     NAME(op), PRIVATE(op)     flora_<op>_<activation type>_<isa>, and the same with a last _ for helpers
 *     ACT(op), REAL(op)         the loads and stores of vec.h for the two types
 */
#include "kernels.h"
#include "vec.h"

#define PASTE2_(a, b) a##_##b
#define PASTE2(a, b) PASTE2_(a, b)
#define PASTE4_(a, b, c) flora_##a##_##b##_##c
#define PASTE4(a, b, c) PASTE4_(a, b, c)
#define NAME(op) PASTE4(op, ACT_NAME, FLORA_ISA)
#define PRIVATE(op) PASTE2(PASTE4(op, ACT_NAME, FLORA_ISA), )
#define ACT(op) PASTE2(ACT_NAME, op)
#define REAL(op) PASTE2(REAL_NAME, op)

/* The height of gemm's register block: its sums take half of the registers (two vectors wide: `WIDE_ROWS`; one vector:
 * `NARROW_ROWS`), which hides the latency of a fused multiply-add and leaves room for b, the broadcast and addresses.
 */
#define WIDE_ROWS (FLORA_REGISTERS / 4)
#define NARROW_ROWS (FLORA_REGISTERS / 2)

/* float32 */
#define ACT_NAME f32
#define REAL_NAME f32
#define LANES F32_LANES
#define act float
#define real float
#define vec f32v
#include "add.inc.h"
#include "gemm.inc.h"
#include "move.inc.h"
#include "few.inc.h"
#include "taps.inc.h"
#include "kronecker.inc.h"
#include "rescale.inc.h"
#include "winograd.inc.h"
#include "spectra.inc.h"
#include "slide.inc.h"
#undef act
#undef ACT_NAME

/* bfloat16 */
#define ACT_NAME bf16
#define act uint16_t
#include "add.inc.h"
#include "gemm.inc.h"
#include "widen.inc.h"
#include "rescale.inc.h"
#include "slide.inc.h"
#undef ACT_NAME

/* float16 */
#define ACT_NAME f16
#include "add.inc.h"
#include "gemm.inc.h"
#include "widen.inc.h"
#include "rescale.inc.h"
#include "slide.inc.h"
#undef act
#undef real
#undef vec
#undef LANES
#undef REAL_NAME
#undef ACT_NAME

/* float64 */
#define ACT_NAME f64
#define REAL_NAME f64
#define LANES F64_LANES
#define act double
#define real double
#define vec f64v
#include "add.inc.h"
#include "gemm.inc.h"
#include "move.inc.h"
#include "few.inc.h"
#include "taps.inc.h"
#include "kronecker.inc.h"
#include "rescale.inc.h"
#include "winograd.inc.h"
#include "spectra.inc.h"
#include "slide.inc.h"
#undef act
#undef real
#undef vec
#undef LANES
#undef REAL_NAME
#undef ACT_NAME

#define SYMBOL(op, dtype) PASTE4(op, dtype, FLORA_ISA)

/* In the order of flora_dtype. */
const flora_kernels PASTE2(flora_kernels, FLORA_ISA)[4] = {
    {4,
     4,
     F32_LANES,
     SYMBOL(gemm, f32),
     SYMBOL(gemm, f32),
     SYMBOL(copy, f32),
     SYMBOL(copy, f32),
     SYMBOL(pack, f32),
     SYMBOL(transpose, f32),
     SYMBOL(sum, f32),
     SYMBOL(add, f32),
     SYMBOL(add, f32),
     SYMBOL(tap_sums, f32),
     SYMBOL(kronecker_sums, f32),
     SYMBOL(rescale, f32),
     SYMBOL(rescale_sums, f32),
     SYMBOL(few_project, f32),
     SYMBOL(few_expand, f32),
     SYMBOL(few_outer, f32),
     SYMBOL(winograd_taps, f32),
     SYMBOL(winograd_filter, f32),
     SYMBOL(winograd_input, f32),
     SYMBOL(winograd_output, f32),
     SYMBOL(slide, f32),
     &SYMBOL(spectra, f32)},
    {8,
     8,
     F64_LANES,
     SYMBOL(gemm, f64),
     SYMBOL(gemm, f64),
     SYMBOL(copy, f64),
     SYMBOL(copy, f64),
     SYMBOL(pack, f64),
     SYMBOL(transpose, f64),
     SYMBOL(sum, f64),
     SYMBOL(add, f64),
     SYMBOL(add, f64),
     SYMBOL(tap_sums, f64),
     SYMBOL(kronecker_sums, f64),
     SYMBOL(rescale, f64),
     SYMBOL(rescale_sums, f64),
     SYMBOL(few_project, f64),
     SYMBOL(few_expand, f64),
     SYMBOL(few_outer, f64),
     SYMBOL(winograd_taps, f64),
     SYMBOL(winograd_filter, f64),
     SYMBOL(winograd_input, f64),
     SYMBOL(winograd_output, f64),
     SYMBOL(slide, f64),
     &SYMBOL(spectra, f64)},
    {2,
     4,
     F32_LANES,
     SYMBOL(gemm, f32),
     SYMBOL(gemm, bf16),
     SYMBOL(widen, bf16),
     SYMBOL(copy, f32),
     SYMBOL(pack, f32),
     SYMBOL(transpose, f32),
     SYMBOL(sum, f32),
     SYMBOL(add, f32),
     SYMBOL(add, bf16),
     SYMBOL(tap_sums, f32),
     SYMBOL(kronecker_sums, f32),
     SYMBOL(rescale, bf16),
     SYMBOL(rescale_sums, bf16),
     SYMBOL(few_project, f32),
     SYMBOL(few_expand, f32),
     SYMBOL(few_outer, f32),
     SYMBOL(winograd_taps, f32),
     SYMBOL(winograd_filter, f32),
     SYMBOL(winograd_input, f32),
     SYMBOL(winograd_output, f32),
     SYMBOL(slide, bf16),
     &SYMBOL(spectra, f32)},
    {2,
     4,
     F32_LANES,
     SYMBOL(gemm, f32),
     SYMBOL(gemm, f16),
     SYMBOL(widen, f16),
     SYMBOL(copy, f32),
     SYMBOL(pack, f32),
     SYMBOL(transpose, f32),
     SYMBOL(sum, f32),
     SYMBOL(add, f32),
     SYMBOL(add, f16),
     SYMBOL(tap_sums, f32),
     SYMBOL(kronecker_sums, f32),
     SYMBOL(rescale, f16),
     SYMBOL(rescale_sums, f16),
     SYMBOL(few_project, f32),
     SYMBOL(few_expand, f32),
     SYMBOL(few_outer, f32),
     SYMBOL(winograd_taps, f32),
     SYMBOL(winograd_filter, f32),
     SYMBOL(winograd_input, f32),
     SYMBOL(winograd_output, f32),
     SYMBOL(slide, f16),
     &SYMBOL(spectra, f32)},
};
