/* CUDA's own crt/host_defines.h comes with nvcc, which torch's wheels do not bring. The other headers need these names
 * from it; for a C compiler that makes no device code all but the alignment are empty. */
#ifndef NULLGPU_HOST_DEFINES_H
#define NULLGPU_HOST_DEFINES_H

#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
#define CUDART_DEVICE
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))

#endif
