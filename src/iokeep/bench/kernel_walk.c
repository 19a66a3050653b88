/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For `iokeep bench run --kernel-source`: the prior table as a domain of the kernel's own page-table code, and
 * a loop that asks its iova_to_phys() for every expected page. Compiled once per format, together with that
 * format's files of a Linux source tree (kernel_walk.py), into a temporary directory.
 */
#ifdef GENERIC_PT
#include <linux/args.h>
#include <linux/generic_pt/iommu.h>
#else
#include <linux/io-pgtable.h>
#endif
#include <linux/errno.h>

#define EXPORT __attribute__((visibility("default")))

unsigned long iokeep_ram;
static unsigned long root_pa;

/*
 * The allocator of table pages gives out the root that is there, once, when a domain is made: so the kernel's
 * own code makes a domain of that table, by its public functions alone. It clears nothing itself: zeroing is
 * the real allocator's business (drivers/iommu/iommu-pages.c).
 */
void *iommu_alloc_pages_node_sz(int nid, gfp_t gfp, size_t size)
{
	return __va(root_pa);
}

/* called by who changes or frees tables: never reached */
#define NEVER_CALLED(prototype) prototype { __builtin_trap(); }
struct iommu_pages_list;
NEVER_CALLED(void iommu_free_pages(void *virt))
NEVER_CALLED(void iommu_put_pages_list(struct iommu_pages_list *list))
NEVER_CALLED(int iommu_pages_start_incoherent(void *virt, struct device *dev))
NEVER_CALLED(int iommu_pages_start_incoherent_list(struct iommu_pages_list *list, struct device *dev))
NEVER_CALLED(void iommu_pages_stop_incoherent_list(struct iommu_pages_list *list, struct device *dev))
NEVER_CALLED(void iommu_pages_free_incoherent(void *virt, struct device *dev))
NEVER_CALLED(void *memset64(uint64_t *at, uint64_t value, size_t n))

#ifdef GENERIC_PT

#define TABLE CONCATENATE(pt_iommu_, GENERIC_PT)
#define INIT CONCATENATE(TABLE, _init)
#define CFG CONCATENATE(TABLE, _cfg)
#define OPS(format) IOMMU_PT_DOMAIN_OPS(format)

static struct TABLE table;
static struct iommu_domain *domain;

#ifdef DYNAMIC_TOP
NEVER_CALLED(static void change_top(struct pt_iommu *iommu, phys_addr_t pa, unsigned int level))
NEVER_CALLED(static spinlock_t *get_top_lock(struct pt_iommu *iommu))
static const struct pt_iommu_driver_ops driver_ops = { .change_top = change_top, .get_top_lock = get_top_lock };
#endif

/* as a driver does (drivers/iommu/intel/iommu.c, amd/iommu.c, riscv/iommu.c) */
EXPORT int iokeep_open(unsigned long ram, u64 root, unsigned int levels, unsigned int va_lg2, unsigned int oa_lg2,
		       unsigned long granule)
{
	static struct iommu_domain_ops ops;
	struct CFG cfg = {
		.common = { .features = FEATURES, .hw_max_vasz_lg2 = va_lg2, .hw_max_oasz_lg2 = oa_lg2 },
#ifdef TOP
		.TOP = levels - 1,
#endif
	};

	iokeep_ram = ram;
	root_pa = root;
	memset(&table, 0, sizeof(table));
#ifdef DYNAMIC_TOP
	table.iommu.driver_ops = &driver_ops;
#endif
	ops = (struct iommu_domain_ops){ OPS(GENERIC_PT) };
	domain = &table.iommu.domain;
	domain->ops = &ops;
	return INIT(&table, &cfg, GFP_KERNEL);
}

#define IOVA_TO_PHYS(iova) (domain->ops->iova_to_phys(domain, (iova)))

#else

static struct io_pgtable_ops *table;

/* as drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c does; of these page sizes those of the granule are taken */
EXPORT int iokeep_open(unsigned long ram, u64 root, unsigned int levels, unsigned int va_lg2, unsigned int oa_lg2,
		       unsigned long granule)
{
	struct io_pgtable_cfg cfg = {
		.pgsize_bitmap = -granule,
		.ias = va_lg2,
		.oas = oa_lg2,
		.coherent_walk = true,
	};

	iokeep_ram = ram;
	root_pa = root;
	table = alloc_io_pgtable_ops(IO_PGTABLE, &cfg, NULL);
	return table ? 0 : -EINVAL;
}

#define IOVA_TO_PHYS(iova) (table->iova_to_phys(table, (iova)))

#endif

/* How many pages of 4096 bytes of so many extents do not translate to what is expected. */
EXPORT u64 iokeep_wrong_pages(const u64 *iova, const u64 *last, const u64 *pa, u64 n)
{
	u64 wrong = 0;

	for (u64 e = 0; e < n; e++)
		for (u64 at = iova[e];; at += 4096) {
			wrong += IOVA_TO_PHYS(at) != pa[e] + (at - iova[e]);
			if (last[e] - at < 4096)
				break;
		}
	return wrong;
}
