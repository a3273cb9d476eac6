/* See vectors.c. */
#ifndef VECTORS_H
#define VECTORS_H

/* What the processor and the kernel offer: "AVX-512", "AVX" or "none". */
const char *vectors_offered(void);

/* Holds patterns that depend on `seed` in all vector registers for a while, `rounds` times. Returns a
 * null pointer, or which register came back changed. */
const char *vectors_hold(unsigned seed, unsigned rounds);

#endif
