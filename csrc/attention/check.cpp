// What every backend may rely on: shapes that fit each other (attention_check), and on the CPU list entries that point
// to existing blocks (attention_check_lists).
#include <vector>

#include "attention/sequences.h"

namespace sparsekit {
namespace {

using Kind = Status::Kind;

/// One row of the lists: where it stands, and which key blocks its sequence has.
struct Row {
  int64_t batch, head, block, number;
  int64_t k_blocks;
};

struct NamedList {
  const BlockList& list;
  const char* counts;
  const char* indices;
};

/// `last_row` (null: duplicates are not looked for) holds for each key block of the sequence the last row listing it.
Status check_row(const NamedList& named, const Row& row, int64_t* last_row) {
  const BlockList& list = named.list;
  if (!list.counts) return {};
  long long b = row.batch, h = row.head, m = row.block;
  int32_t count = list.counts[row.number];
  if (count < 0 || count > list.capacity) {
    return error(Kind::invalid_argument, "%s[%lld, %lld, %lld] is %d; supported: 0 to %d, the last size of %s",
                 named.counts, b, h, m, count, list.capacity, named.indices);
  }
  for (int32_t slot = 0; slot < count; ++slot) {
    int32_t index = list.indices[row.number * list.capacity + slot];
    if (index < -1 || index >= row.k_blocks) {
      return error(Kind::invalid_argument,
                   "%s[%lld, %lld, %lld, %d] is %d; supported: -1 (empty) or a key block from 0 to %lld", named.indices,
                   b, h, m, slot, index, (long long)row.k_blocks - 1);
    }
    if (!last_row || index < 0) continue;
    if (last_row[index] == row.number) {
      return error(Kind::invalid_argument,
                   "%s[%lld, %lld, %lld, %d] is %d, a block that this row lists twice; list each block once, in the "
                   "partial or in the full list",
                   named.indices, b, h, m, slot, index);
    }
    last_row[index] = row.number;
  }
  return {};
}

Status check_rows(const AttentionProblem& problem, bool duplicates) {
  const BlockLists& lists = problem.lists;
  const NamedList partial{lists.partial, "kv_num_blocks", "kv_indices"};
  const NamedList full{lists.full, "full_kv_num_blocks", "full_kv_indices"};
  std::vector<int64_t> last_row;
  if (duplicates) last_row.assign(size_t(problem.k_blocks()), -1);
  for (int64_t outer = 0; outer < lists.list_batch * lists.list_heads; ++outer) {
    for (SequenceWalk walk(problem); walk.valid(); walk.next()) {
      const Sequence& sequence = walk.current;
      int64_t rows = ceil_div(sequence.len_q(), lists.block_q);
      for (int64_t m = sequence.list_row; m < sequence.list_row + rows; ++m) {
        Row row{outer / lists.list_heads, outer % lists.list_heads, m, outer * lists.q_blocks + m,
                ceil_div(sequence.len_k(), lists.block_k)};
        int64_t* marks = duplicates ? last_row.data() + sequence.k_block : nullptr;
        Status status = check_row(partial, row, marks);
        if (status.ok()) status = check_row(full, row, marks);
        if (!status.ok()) return status;
      }
    }
  }
  return {};
}

Status check_cu_seqlens(const char* name, const int32_t* cu, int64_t sequences, int64_t length, int64_t longest) {
  for (int64_t s = 0; s <= sequences; ++s) {
    int64_t previous = s ? cu[s - 1] : 0;
    if (cu[s] < previous || cu[s] > length || (s == 0 && cu[0] != 0)) {
      return error(Kind::invalid_argument,
                   "%s[%lld] is %d; supported: 0 first, then ascending to at most the tensor's %lld rows", name,
                   (long long)s, cu[s], (long long)length);
    }
    if (cu[s] - previous > longest) {
      return error(Kind::invalid_argument, "%s: sequence %lld has %lld rows; supported: at most the given maximum %lld",
                   name, (long long)s - 1, (long long)(cu[s] - previous), (long long)longest);
    }
  }
  return {};
}

Status check_stripes(const AttentionProblem& p) {
  const StripeLists& stripes = p.stripes;
  if (p.packed()) return error(Kind::unsupported, "cu_seqlens_q: packed batches have no stripes; supported: padded");
  if (stripes.list_batch != 1 && stripes.list_batch != p.batch) {
    return error(Kind::invalid_argument, "col_counts has batch size %lld; supported: 1 or query's %lld",
                 (long long)stripes.list_batch, (long long)p.batch);
  }
  if (stripes.list_heads != 1 && stripes.list_heads != p.heads_kv && stripes.list_heads != p.heads_q) {
    return error(Kind::invalid_argument, "col_counts has %lld heads; supported: 1, key's %lld or query's %lld",
                 (long long)stripes.list_heads, (long long)p.heads_kv, (long long)p.heads_q);
  }
  if (stripes.groups != ceil_div(p.len_q, stripes.group_size)) {
    return error(Kind::invalid_argument,
                 "col_counts has %lld groups; supported: %lld, query's length %lld in groups of %d",
                 (long long)stripes.groups, (long long)ceil_div(p.len_q, stripes.group_size), (long long)p.len_q,
                 stripes.group_size);
  }
  if (stripes.sink < 0 || stripes.local < 0) {
    return error(Kind::invalid_argument, "sink, local are %lld, %lld; supported: 0 (none) or a number of keys",
                 (long long)stripes.sink, (long long)stripes.local);
  }
  return {};
}

}  // namespace

Status attention_check(const AttentionProblem& p) {
  const BlockLists& lists = p.lists;
  if (p.batch < 0 || p.heads_q < 0 || p.len_q < 0 || p.len_k < 0) {
    return error(Kind::invalid_argument, "query, key: negative sizes");
  }
  if (p.heads_kv <= 0 ? p.heads_q > 0 : p.heads_q % p.heads_kv != 0) {
    return error(Kind::invalid_argument, "query has %lld heads and key %lld; supported: a multiple of key's heads",
                 (long long)p.heads_q, (long long)p.heads_kv);
  }
  if (p.head_dim <= 0 || p.value_dim <= 0) {
    return error(Kind::invalid_argument, "query, value: head dimensions are %d and %d; supported: 1 and more",
                 p.head_dim, p.value_dim);
  }
  if (lists.block_q <= 0 || lists.block_k <= 0) {
    return error(Kind::invalid_argument, "block_size is (%d, %d); supported: positive sizes", lists.block_q,
                 lists.block_k);
  }
  bool has_rows = lists.list_batch * lists.list_heads * lists.q_blocks > 0;  // an empty tensor has no address
  if (has_rows && !p.stripes.any() && !lists.partial.counts && !lists.full.counts) {
    return error(Kind::invalid_argument, "kv_num_blocks: no list of key blocks is given");
  }
  if (lists.list_batch != 1 && lists.list_batch != p.batch) {
    return error(Kind::invalid_argument, "kv_num_blocks has batch size %lld; supported: 1 or query's %lld",
                 (long long)lists.list_batch, (long long)p.batch);
  }
  if (lists.list_heads != 1 && lists.list_heads != p.heads_kv && lists.list_heads != p.heads_q) {
    return error(Kind::invalid_argument, "kv_num_blocks has %lld heads; supported: 1, key's %lld or query's %lld",
                 (long long)lists.list_heads, (long long)p.heads_kv, (long long)p.heads_q);
  }
  int64_t rows = p.packed() ? 0 : ceil_div(p.len_q, lists.block_q);
  if (p.packed() ? lists.q_blocks < ceil_div(p.len_q, lists.block_q) : lists.q_blocks != rows) {
    return error(
        Kind::invalid_argument, "kv_num_blocks has %lld rows; supported: %lld, query's length %lld in blocks of %d",
        (long long)lists.q_blocks, (long long)ceil_div(p.len_q, lists.block_q), (long long)p.len_q, lists.block_q);
  }
  if (p.packed() && p.batch != 1) {
    return error(Kind::invalid_argument, "query: a packed batch has batch size 1, found %lld", (long long)p.batch);
  }
  if (lists.q_blocks * lists.slots_per_row() > INT32_MAX) {
    return error(Kind::invalid_argument, "kv_indices has %lld slots per head; supported: at most 2^31 - 1",
                 (long long)(lists.q_blocks * lists.slots_per_row()));
  }
  if (p.window_left < -1 || p.window_right < -1) {
    return error(Kind::invalid_argument, "window is (%lld, %lld); supported: -1 (unlimited) or a number of keys",
                 (long long)p.window_left, (long long)p.window_right);
  }
  if (!(p.softcap >= 0.f)) {
    return error(Kind::invalid_argument, "softcap is %g; supported: 0 (none) or a positive number", p.softcap);
  }
  return p.stripes.any() ? check_stripes(p) : Status{};
}

Status attention_check_columns(const StripeLists& stripes, int64_t len_k, bool duplicates) {
  std::vector<int64_t> last_row;
  if (duplicates) last_row.assign(size_t(len_k), -1);
  int64_t rows = stripes.list_batch * stripes.list_heads * stripes.groups;
  for (int64_t row = 0; row < rows; ++row) {
    long long b = row / stripes.groups / stripes.list_heads, h = row / stripes.groups % stripes.list_heads;
    long long g = row % stripes.groups;
    int32_t count = stripes.counts[row];
    if (count < 0 || count > stripes.capacity) {
      return error(Kind::invalid_argument,
                   "col_counts[%lld, %lld, %lld] is %d; supported: 0 to %d, the last size of col_indices", b, h, g,
                   count, stripes.capacity);
    }
    for (int32_t slot = 0; slot < count; ++slot) {
      int32_t index = stripes.indices[row * stripes.capacity + slot];
      if (index < -1 || index >= len_k) {
        return error(Kind::invalid_argument,
                     "col_indices[%lld, %lld, %lld, %d] is %d; supported: -1 (empty) or a key from 0 to %lld", b, h, g,
                     slot, index, (long long)len_k - 1);
      }
      if (!duplicates || index < 0) continue;
      if (last_row[size_t(index)] == row) {
        return error(Kind::invalid_argument,
                     "col_indices[%lld, %lld, %lld, %d] is %d, a column that this group lists twice; list each column "
                     "once",
                     b, h, g, slot, index);
      }
      last_row[size_t(index)] = row;
    }
  }
  return {};
}

Status attention_check_lists(const AttentionProblem& problem, bool duplicates) {
  const BlockLists& lists = problem.lists;
  if (problem.packed()) {
    Status status =
        check_cu_seqlens("cu_seqlens_q", problem.cu_seqlens_q, problem.sequences, problem.len_q, problem.max_len_q);
    if (status.ok()) {
      status =
          check_cu_seqlens("cu_seqlens_k", problem.cu_seqlens_k, problem.sequences, problem.len_k, problem.max_len_k);
    }
    if (!status.ok()) return status;
    SequenceWalk walk(problem);
    while (walk.valid()) walk.next();
    if (walk.current.list_row > lists.q_blocks) {
      return error(Kind::invalid_argument,
                   "kv_num_blocks has %lld rows; supported: at least %lld, the query blocks of all sequences",
                   (long long)lists.q_blocks, (long long)walk.current.list_row);
    }
  }
  Status status = check_rows(problem, duplicates);
  if (status.ok() && problem.stripes.any()) {
    status = attention_check_columns(problem.stripes, problem.len_k, duplicates);
  }
  if (!status.ok() || !lists.bits_index || !lists.partial.counts) return status;
  int64_t slots = lists.list_batch * lists.list_heads * lists.q_blocks * lists.partial.capacity;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (lists.bits_index[slot] < -1 || lists.bits_index[slot] >= lists.bits_count) {
      return error(
          Kind::invalid_argument,
          "partial_bits_index: entry %lld is %d; supported: -1 (no bits) or 0 to %lld, the masks of partial_bits",
          (long long)slot, lists.bits_index[slot], (long long)lists.bits_count - 1);
    }
  }
  return {};
}

}  // namespace sparsekit
