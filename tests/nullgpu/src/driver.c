/* The rest of the driver API: contexts, and how CUDA's libraries find functions by name. */
#include "nullgpu.h"

#include <dlfcn.h>
#include <stdio.h>

/* A device has one context; its handle is the device's number, counted from 1. */
static CUcontext context_of(int device) { return (CUcontext)(uintptr_t)(device + 1); }

API CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = context_of(current);
    return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context) {
    if (context) current = (int)(uintptr_t)context - 1;
    return CUDA_SUCCESS;
}

API CUresult cuCtxPushCurrent_v2(CUcontext context) { return cuCtxSetCurrent(context); }
API CUresult cuCtxPopCurrent_v2(CUcontext *context) { return cuCtxGetCurrent(context); }

API CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current;
    return CUDA_SUCCESS;
}

API CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) {
    *context = context_of(stream_of(stream)->device);
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetLimit(size_t *value, CUlimit which) {
    *value = 0;
    return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit which, size_t value) { return CUDA_SUCCESS; }

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = context_of(device);
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return CUDA_SUCCESS; }

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}

/* ---- functions by name */

void *entry_point(const char *name) {
    char newer[128];
    void *found = dlsym(RTLD_DEFAULT, name);
    for (int version = 2; !found && version < 4; version++) {
        snprintf(newer, sizeof newer, "%s_v%d", name, version);
        found = dlsym(RTLD_DEFAULT, newer);
    }
    return found;
}

API CUresult cuGetProcAddress_v2(const char *name, void **p, int version, cuuint64_t flags,
                                 CUdriverProcAddressQueryResult *how) {
    *p = entry_point(name);
    if (how) *how = *p ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *p ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API int cudaGetDriverEntryPoint(const char *name, void **p, unsigned long long flags, int *how) {
    *p = entry_point(name);
    if (how) *how = *p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *p ? 0 : cudaErrorSymbolNotFound;
}

API int cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned version, unsigned long long flags,
                                         int *how) {
    return cudaGetDriverEntryPoint(name, p, flags, how);
}
