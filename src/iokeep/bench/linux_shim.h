/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands in for what a few files of a Linux source tree need of the kernel around them, so that they compile
 * unchanged in user space: `iokeep bench run --kernel-source`. It is included before everything else; the
 * headers named in kernel_walk.py are left out or taken from asm-generic, all others are the tree's own.
 *
 * Only reading has to work: making a domain of a table that is there, and its iova_to_phys(). Whatever
 * allocates, maps, unmaps or tells a device ends the process (NEVER); nothing here calls it.
 */
#ifndef IOKEEP_LINUX_SHIM_H
#define IOKEEP_LINUX_SHIM_H

/* of a 64-bit kernel; debugging is off, as it is in one that somebody would measure */
#define CONFIG_64BIT 1
#define CONFIG_PHYS_ADDR_T_64BIT 1
#define CONFIG_ARCH_DMA_ADDR_T_64BIT 1
#define CONFIG_IOMMU_API 1
#define CONFIG_IOMMU_PT 1
#define CONFIG_IOMMU_IO_PGTABLE_LPAE 1

#include <linux/types.h>
#include <linux/stddef.h>
#include <asm/barrier.h>
#include <linux/bitops.h>
#include <linux/dma-direction.h>
#include <linux/err.h>
#include <linux/gfp_types.h>
#include <linux/limits.h>
#include <linux/list.h>
#include <linux/log2.h>
#include <linux/math.h>
#include <linux/minmax.h>
#include <linux/overflow.h>
#include <linux/string.h>

#define NEVER ({ __builtin_trap(); 0; })

/*
 * Physical memory is one piece, from pa 0. Adding a variable to a pa is what x86 does where the direct map's
 * place is random (page_offset_base, arch/x86/include/asm/page_64_types.h).
 */
extern unsigned long iokeep_ram;
#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_MASK (~(PAGE_SIZE - 1))
#define __va(pa) ((void *)((unsigned long)(pa) + iokeep_ram))
#define __pa(va) ((unsigned long)(va) - iokeep_ram)
#define phys_to_virt(pa) __va(pa)
#define virt_to_phys(va) __pa(va)

/* io-pgtable-arm.c takes memory for its own structure, which is all that it gives back if it fails */
void *calloc(size_t n, size_t size);
void free(void *memory);
#define kmalloc_obj(of) ((typeof(of) *)calloc(1, sizeof(of)))
#define kfree(memory) free(memory)
#define NUMA_NO_NODE (-1)
#define dev_to_node(dev) NUMA_NO_NODE

/* what is only a member, or only named, where we pass */
typedef struct { int unused; } spinlock_t;
typedef struct { int unused; } refcount_t;
struct mutex { int unused; };
struct work_struct { int unused; };
struct sg_table { void *sgl; unsigned int orig_nents; };
struct device { struct dev_iommu *iommu; };
struct attribute_group;
struct folio;
struct of_phandle_args;
struct pci_dev;
struct scatterlist;

/* without its text a warning is a bug of the stand-in, not of the kernel */
#define WARN_ON(condition) ({ int _warned = !!(condition); if (_warned) __builtin_trap(); _warned; })
#define WARN_ON_ONCE WARN_ON
#define WARN_ONCE(condition, ...) WARN_ON(condition)
#define pr_err_ratelimited(...) ((void)NEVER)
#define dev_err(...) ((void)NEVER)

/* no module */
#define EXPORT_SYMBOL_GPL(name)
#define EXPORT_SYMBOL_NS_GPL(name, namespace)
#define MODULE_LICENSE(text)
#define MODULE_DESCRIPTION(text)
#define MODULE_IMPORT_NS(text)

/* writing: never reached */
#define try_cmpxchg(at, old, new) ((void)(at), (void)(old), (void)(new), NEVER)
#define try_cmpxchg64 try_cmpxchg
#define try_cmpxchg_release try_cmpxchg
#define try_cmpxchg64_release try_cmpxchg
#define cmpxchg64_relaxed(at, old, new) ((void)(at), (void)(old), (void)(new), NEVER)
#define set_bit(bit, at) ((void)NEVER)
#define spin_lock_irqsave(lock, flags) ((void)NEVER, (void)(flags))
#define spin_unlock_irqrestore(lock, flags) ((void)NEVER, (void)(flags))
#define virt_to_folio(va) ((struct folio *)(long)NEVER)
#define copy_from_user(...) NEVER
#define copy_struct_from_user(...) NEVER
#define copy_struct_to_user(...) NEVER
#define dev_get_drvdata(dev) ((void *)(long)NEVER)
#define dma_map_single(...) ((dma_addr_t)NEVER)
#define dma_mapping_error(...) NEVER
#define dma_unmap_single(...) ((void)NEVER)
#define dma_sync_single_for_device(...) ((void)NEVER)

#endif
