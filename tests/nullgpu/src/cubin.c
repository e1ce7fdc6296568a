/* Registers, stack and parameters of a kernel, read from its ELF file (a cubin). */
#include "nullgpu.h"

#include <elf.h>
#include <stdlib.h>
#include <string.h>

/* Attributes of a .nv.info section. Each starts with a format byte, the attribute's number and 16 bits, which are its
 * value (formats 1 to 3) or the length of what follows (format 4). */
#define PARAMETER 0x17     /* index (4 bytes), number (2), offset (2), then 32 bits with the size in the upper 14 */
#define FRAME_SIZE 0x11    /* symbol (4), bytes (4) */
#define REGISTERS 0x2f     /* symbol (4), registers of a thread (4) */

static uint32_t word(const uint8_t *p) {
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

struct kernel *kernel_in(const void *cubin, const char *name) {
    const uint8_t *start = cubin;
    const Elf64_Ehdr *header = cubin;
    struct kernel *k = calloc(1, sizeof *k);
    strncpy(k->name, name, sizeof k->name - 1);
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_shentsize != sizeof(Elf64_Shdr)) return k;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(start + header->e_shoff);
    const char *titles = (const char *)start + sections[header->e_shstrndx].sh_offset;

    const Elf64_Sym *symbols = NULL;
    const char *texts = NULL;
    for (int i = 0; i < header->e_shnum; i++)
        if (sections[i].sh_type == SHT_SYMTAB) {
            symbols = (const Elf64_Sym *)(start + sections[i].sh_offset);
            texts = (const char *)start + sections[sections[i].sh_link].sh_offset;
        }

    for (int i = 0; i < header->e_shnum; i++) {
        const char *title = titles + sections[i].sh_name;
        bool own = !strncmp(title, ".nv.info.", 9) && !strcmp(title + 9, name);
        if (!own && strcmp(title, ".nv.info")) continue;
        const uint8_t *p = start + sections[i].sh_offset, *end = p + sections[i].sh_size;
        while (p + 4 <= end) {
            int format = p[0], number = p[1], size = p[2] | p[3] << 8;
            const uint8_t *value = p + 4;
            p = value + (format == 4 ? size : 0);
            if (format != 4 || p > end) continue;
            if (own && number == PARAMETER && size >= 12) {
                int which = value[4] | value[5] << 8;
                if (which < MAX_PARAMETERS) {
                    k->size[which] = word(value + 8) >> 18;
                    if (which >= k->parameters) k->parameters = which + 1;
                }
            } else if (!own && symbols && size >= 8 && !strcmp(texts + symbols[word(value)].st_name, name)) {
                if (number == REGISTERS) k->registers = word(value + 4);
                if (number == FRAME_SIZE) k->local = word(value + 4);
            }
        }
    }
    return k;
}
