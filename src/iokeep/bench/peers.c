/* SPDX-License-Identifier: Apache-2.0 */
/* What others do with a page table, for `iokeep bench`: a walk per page, and one pass table by table. */
#include <stddef.h>
#include <stdint.h>

struct level {
	uint64_t shift, index_mask, valid_mask, leaf_mask, leaf_value, table_pa_mask, leaf_pa_mask;
	uint64_t table, leaf;
};

/* An iova_to_phys() per page: 4096-byte pages whose pa or item's other bits are not as expected. */
uint64_t walk_pages(const uint8_t *ram, uint64_t root_pa, const struct level *levels, uint64_t top,
		    const uint64_t *iova, const uint64_t *last, const uint64_t *pa, uint64_t n,
		    uint64_t perm, uint64_t care)
{
	uint64_t wrong = 0;

	for (uint64_t e = 0; e < n; e++)
		for (uint64_t at = iova[e];; at += 4096) {
			uint64_t table = root_pa, level = top, found = 1;

			for (;; level--) {
				const struct level *l = &levels[level];
				uint64_t item = ((const uint64_t *)(ram + table))[(at >> l->shift) & l->index_mask];

				if (!(item & l->valid_mask))
					break;
				if (!l->table || (l->leaf && (item & l->leaf_mask) == l->leaf_value)) {
					uint64_t inner = at & ((1ULL << l->shift) - 1);
					uint64_t to = (item & l->leaf_pa_mask) | inner;

					found = to != pa[e] + (at - iova[e]);
					if (!level)
						found |= ((item ^ perm) & care & ~l->leaf_pa_mask) != 0;
					break;
				}
				table = item & l->table_pa_mask;
			}
			wrong += found;
			if (last[e] - at < 4096)
				break;
		}
	return wrong;
}

/* Table by table: the items of each must be a ramp. Tables where one is not. */
uint64_t sweep_tables(const uint64_t *ram, const int64_t *row, const uint64_t *word, uint64_t n, uint64_t items,
		      uint64_t step, uint64_t care)
{
	uint64_t bad = 0;

	for (uint64_t t = 0; t < n; t++) {
		const uint64_t *table = ram + (uint64_t)row[t] * items;
		uint64_t want = word[t], wrong = 0;

		for (uint64_t i = 0; i < items; i++)
			wrong |= (table[i] ^ (want + i * step)) & care;
		bad += wrong != 0;
	}
	return bad;
}
