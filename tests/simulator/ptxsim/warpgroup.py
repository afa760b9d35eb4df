"""What wgmma (sm_90) and tcgen05 (sm_100) share: operands in shared memory by descriptors, read while in flight."""
import numpy as np
from .parse import PtxError

u32, i64 = np.uint32, np.int64
IN_FLIGHT = u32(0x7FC0DEAD)                                  # what a register or tensor memory holds until then: NaN


def units(desc, rows, k16, transposed):
    """Shared addresses [G, X, Y] of the 16-byte units of a matrix by its descriptors [G]: X rows of Y units along K, or
    transposed X steps of K with Y units along the rows. `k16`: units along K, or steps of K when transposed.

    The canonical layouts of the PTX ISA's chapters on wgmma's and tcgen05's shared memory: 8 rows of 128, 64, 32 or 16
    bytes follow each other; SBO leads to the next 8, LBO to the next along the other side. The XOR acts on the address.
    """
    d = desc.astype(np.uint64)
    field = lambda at, bits: ((d >> np.uint64(at)) & np.uint64((1 << bits) - 1)).astype(i64)
    start, lead, stride, mode = field(0, 14) * 16, field(16, 14) * 16, field(32, 14) * 16, field(62, 2)
    if field(49, 4).any() or field(61, 1).any(): raise PtxError('matrix descriptor with a base offset or an unknown mode')
    if (mode != mode[0]).any(): raise PtxError('matrix descriptors of several swizzles')
    wide = {0: 1, 1: 8, 2: 4, 3: 2}[int(mode[0])]            # units of one row of the pattern
    start, lead, stride = start[:, None, None], lead[:, None, None], stride[:, None, None]
    if transposed:
        x, y = np.arange(k16)[:, None], np.arange(rows // 8)[None, :]
        if wide == 1: lead, stride = stride, lead
        a = start + y % wide * 16 + y // wide * lead + x % 8 * wide * 16 + x // 8 * stride
    else:
        x, y = np.arange(rows)[:, None], np.arange(k16)[None, :]
        a = start + x % 8 * wide * 16 + x // 8 * stride + y * (lead if wide == 1 else 16)
    return a ^ (a >> 7 & wide - 1) * 16


def read_operand(X, desc, lanes, rows, K, transposed, ty, decode, ins, warp=None):
    """(matrices [G, rows, K] in float64, rows of 16 bytes [G, n]) for the descriptors of `lanes`; in flight from now on.
    `warp`: a name for the race check, by lane; None: nobody needs a barrier to write when the product is done."""
    a = units(desc, rows, K if transposed else 2, transposed); G, shape = len(desc), a.shape
    lanes = np.repeat(lanes, a[0].size)
    if warp is None:
        i = X.shared_index(a.reshape(-1), lanes, 16, ins, True, changed=False)
        if X.S.check and X.S.wv[16][i].any(): X.race(X.S.wv[16][i].any(1), lanes, ins, 'read of a word written')
    else: i = X.shared_index(a.reshape(-1), lanes, 16, ins, True, warp=np.repeat(warp, a[0].size))
    if X.S.unfenced[i].any():
        X.fault(f'{ins.op} reads shared memory written without a fence.proxy.async since', X.S.unfenced[i], lanes, ins)
    np.add.at(X.S.reading, i, 1)
    X.c['shared_load_bytes'] += 16 * len(i)
    raw = np.ascontiguousarray(X.S.mem.reshape(-1, 16)[i])
    v = decode(raw.reshape(*shape[:2], -1).view(u32), ty)
    return (v.swapaxes(1, 2) if transposed else v).astype(np.float64), i.reshape(G, -1)
