/* A driver with two GPUs that says what it is asked to launch, for `launches.py`: what Numba and cuda.core call
   to launch a kernel, as in NVIDIA's reference. A context's handle tells its device. */

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define CONTEXT 0x1000
#define PARAMETERS 6

typedef void *Handle;

typedef struct {
    unsigned grid[3], block[3], shared;
    Handle stream;
} Launch;

static __thread Handle current;
static intptr_t libraries = 0x2000;

static int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
static int cuDeviceGetCount(int *count) { return *count = 2, 0; }
static int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
static int cuDeviceGetUuid(char *uuid, int device) { return memset(uuid, device, 16), 0; }
static int cuDeviceGetName(char *name, int length, int device) { return strncpy(name, "GPU", length), 0; }

static int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1024; /* the compute capability, and what is large */
    return 0;
}

static int cuDevicePrimaryCtxRetain(Handle *context, int device) {
    return *context = (Handle)(intptr_t)(CONTEXT + device), 0;
}

static int cuCtxGetCurrent(Handle *context) { return *context = current, 0; }
static int cuCtxSetCurrent(Handle context) { return current = context, 0; }
static int cuCtxPushCurrent(Handle context) { return current = context, 0; }
static int cuCtxPopCurrent(Handle *context) { return *context = current, current = NULL, 0; }
static int cuCtxGetDevice(int *device) { return *device = (int)((intptr_t)current - CONTEXT), 0; }

static int cuMemGetInfo(size_t *free, size_t *total) { return *free = *total = (size_t)1 << 36, 0; }

static int cuLibraryLoadData(Handle *library) { return *library = (Handle)(libraries += 16), 0; }

static int cuLibraryGetKernel(Handle *kernel, Handle library, const char *name) {
    return *kernel = (Handle)((intptr_t)library + 1), 0;
}

static int cuKernelGetAttribute(int *value) { return *value = 0, 0; }

static int cuLaunchKernelEx(const Launch *launch, Handle kernel, void **parameters) {
    if (!kernel)
        return 400; /* CUDA_ERROR_INVALID_HANDLE */
    printf("%d %td %u %u", (int)((intptr_t)current - CONTEXT), (intptr_t)launch->stream, launch->grid[0],
           launch->block[0]);
    for (int i = 0; i < PARAMETERS; i++)
        printf(" %u", *(unsigned *)parameters[i]); /* the lower half of what has 8 bytes */
    return printf("\n"), fflush(stdout), 0;
}

static int others(void) { return 0; }

#define KNOWN(name) {#name, (void *)name}

static const struct {
    const char *name;
    void *function;
} functions[] = {
    KNOWN(cuDriverGetVersion),  KNOWN(cuDeviceGetCount),     KNOWN(cuDeviceGet),
    KNOWN(cuDeviceGetUuid),     KNOWN(cuDeviceGetName),      KNOWN(cuDeviceGetAttribute),
    KNOWN(cuCtxGetCurrent),     KNOWN(cuCtxSetCurrent),      KNOWN(cuCtxPushCurrent),
    KNOWN(cuCtxPopCurrent),     KNOWN(cuCtxGetDevice),       KNOWN(cuDevicePrimaryCtxRetain),
    KNOWN(cuMemGetInfo),        KNOWN(cuLibraryLoadData),    KNOWN(cuLibraryGetKernel),
    KNOWN(cuKernelGetAttribute), KNOWN(cuLaunchKernelEx),
};

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found) {
    *function = (void *)others;
    if (found)
        *found = 0;
    if (!strcmp(name, "cuGetProcAddress"))
        *function = (void *)cuGetProcAddress_v2;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        size_t length = strlen(functions[i].name);
        int same = !strncmp(name, functions[i].name, length);
        if (same && (!name[length] || name[length] == '_')) /* name_v2, name_ptsz */
            *function = functions[i].function;
    }
    return 0;
}

int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
