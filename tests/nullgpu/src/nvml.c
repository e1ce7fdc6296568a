/* NVML (libnvidia-ml.so.1): as much as PyTorch asks. The other functions are not there: it then asks CUDA. */
#include "nullgpu.h"

#include <stdio.h>
#include <stdlib.h>

#define NOT_SUPPORTED 3
#define UNKNOWN 6

API int nvmlInit_v2(void) { return 0; }
API int nvmlShutdown(void) { return 0; }

API int nvmlDeviceGetCount_v2(unsigned *n) {
    *n = face.count;
    return 0;
}

API int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = face.driver;
    return 0;
}

/* A handle is the device's number, counted from 1. */
API int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **device) {
    *device = (void *)(uintptr_t)(number + 1);
    return number < (unsigned)face.count ? 0 : UNKNOWN;
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) { /* 0000:01:00.0 is the first */
    unsigned number;
    if (sscanf(bus, "%*x:%x:", &number) != 1) return UNKNOWN;
    return nvmlDeviceGetHandleByIndex_v2(number - 1, device);
}

API int nvmlDeviceGetUUID(void *device, char *text, unsigned room) {
    unsigned n = (unsigned)(uintptr_t)device;
    unsigned word = n << 24 | n << 16 | n << 8 | n, half = n << 8 | n;
    snprintf(text, room, "GPU-%08x-%04x-%04x-%04x-%04x%08x", word, half, half, half, half, word);
    return 0;
}

API int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return NOT_SUPPORTED; }

API int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, void *list) {
    *n = 0;
    return 0;
}

API int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *n, void *list) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, n, list);
}
