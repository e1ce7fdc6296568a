/* The null GPU: CUDA's runtime, driver and cuBLAS for PyTorch's and Triton's host code, without a GPU.
 *
 * A library loaded with LD_PRELOAD, which also stands as libcuda.so.1 and libnvidia-ml.so.1. It claims to be a card,
 * hands out memory, takes launches, checks what a real driver would refuse, writes down what happens, and computes
 * nothing. Device memory is host address space that is reserved and not touched; only small copies move bytes.
 *
 *     face.c     which card it claims to be, and the questions about devices
 *     log.c      the log of events, errors, refusals
 *     memory.c   memory of each device, copies, virtual memory management
 *     stream.c   streams, events, synchronisation, graph capture
 *     launch.c   kernel launches: PyTorch's own, and Triton's with what their cubin says
 *     cubin.c    registers, stack and parameters of a kernel, read from its ELF file
 *     blas.c     cuBLAS: products that are written down and not computed
 *     driver.c   the rest of the driver API
 *     nvml.c     the little that PyTorch asks NVML
 *
 * Settings are environment variables NULLGPU_*, see face.c; the Python side (tests/nullgpu/__init__.py) sets them.
 * The log is one JSON object a line in the file NULLGPU_LOG.
 */
#ifndef NULLGPU_H
#define NULLGPU_H

#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL /* cuda.h then names functions as they are in the library */
#include <cuda.h>
#include <driver_types.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
#define MAX_DEVICES 8 /* their addresses end where a program's own begin */

/* ---- face.c */
struct face {
    const char *name;
    int count, major, minor, driver;
    size_t memory;                      /* bytes that a program can see; what a context takes is held back */
    int shared_block, shared_sm;        /* bytes of shared memory: of a block (opted in), of a multiprocessor */
    int multiprocessors, threads_sm, blocks_sm, l2;
};
extern struct face face;
extern __thread int current;            /* device of this thread */
int attribute(int number, int device);  /* value of a cudaDevAttr, which are CU_DEVICE_ATTRIBUTEs too */

/* ---- log.c */
void record(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Write down and print what a driver would refuse, break a running capture, return the error. */
int refuse(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
int fail(int error); /* return it, and keep it for cudaGetLastError: every failing call of the runtime does this */

/* ---- memory.c */
int device_of(const void *p); /* of an address of device memory; −1 for any other */

/* ---- stream.c */
struct stream {
    int number, device;
    unsigned long long capture; /* the capture it belongs to, or 0 */
};
struct stream *stream_of(const void *handle);     /* the default streams have no memory of their own: by device */
unsigned long long count_node(struct stream *s); /* of a capture, where s is in one; returns its number or 0 */
int unsafe_in_capture(const char *call);          /* 0, or the error of a call that no capture allows */

/* ---- launch.c */
int launch(const char *how, const char *name, dim3 grid, dim3 block, size_t shared, const void *stream,
           int pointers_on);

/* ---- cubin.c */
#define MAX_PARAMETERS 256
struct kernel {
    char name[256];
    int registers, local;             /* registers of a thread, bytes of its stack */
    int max_dynamic, parameters;      /* bytes of shared memory it has asked for: Triton's is all dynamic */
    uint8_t size[MAX_PARAMETERS]; /* bytes of each parameter */
};
struct kernel *kernel_in(const void *cubin, const char *name); /* sizes are 0 where the file does not say */

/* ---- driver.c */
void *entry_point(const char *name);

#endif
