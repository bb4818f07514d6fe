"""One kernel for every algorithm, over all layers of a batch at once.

A program works on one chunk of a layer, by the equations of the algorithm, compiled from their own text. Only
a chunk that the end of its layer cuts needs a mask. The kernel has its code twice, with a mask and without,
as loads and stores without one are four times as wide. A layer that does not begin at a multiple of 16 bytes
takes the code with a mask, and no other layer does for it.

Squares are added up in float64: in float32 those of numbers below 1e-19 vanish.
"""

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _address(columns, column, layer, layers):
    """Return where the tensor of a layer begins."""
    return tl.load(columns + column * layers + layer)


@triton.jit
def _pointer_to(address, dtype: tl.constexpr, has_mask: tl.constexpr):
    """Return a pointer to a tensor; without a mask, to one that begins at a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(dtype))
    if not has_mask:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, mask, has_mask: tl.constexpr):
    """Load elements in float32."""
    if has_mask:
        x = tl.load(pointer, mask=mask, other=0.0)
    else:
        x = tl.load(pointer)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, x, mask, has_mask: tl.constexpr):
    """Store elements, cast to the type that the pointer is to."""
    x = x.to(pointer.dtype.element_ty)
    if has_mask:
        tl.store(pointer, x, mask=mask)
    else:
        tl.store(pointer, x)


@triton.jit
def _square(x):
    """Return the squares in float64."""
    x = x.to(tl.float64)
    return x * x


@triton.jit
def _number(value, layer, kind: tl.constexpr):
    """Return what an equation takes for a layer: a number, or what lies in a tensor, for all or for each."""
    if kind == "each":
        number = tl.load(value + layer).to(tl.float32)
    elif kind == "all":
        number = tl.load(value).to(tl.float32)
    else:
        number = value
    return number


@triton.jit
def root(x):
    """Return the square root, which torch has under another name."""
    return tl.sqrt(x)


@triton.jit
def walk(
    columns,
    sizes,
    layer_of_chunk,
    offset_of_chunk,
    places,
    directions,
    sums,
    factors,
    kinds,
    lr,
    weight_decay,
    gradient_scale,
    layers,
    chunks,
    h,
    direction: tl.constexpr,
    measured: tl.constexpr,
    numbers: tl.constexpr,
    moments: tl.constexpr,
    absent: tl.constexpr,
    dtype: tl.constexpr,
    does: tl.constexpr,
    decays: tl.constexpr,
    has_scale: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    """Do one of three things to the layers.

    ``"measure"``: add up the squares of the weights, and of what they are measured against: what ``measured``
    returns, or else ``direction``, which then is kept and advances the moments. ``"move"``: move weights and
    moments. ``"apply"``: move the weights along the direction that has been kept.
    """
    chunk = tl.program_id(0)
    layer = tl.load(layer_of_chunk + chunk)
    offset = tl.multiple_of(tl.load(offset_of_chunk + chunk), 16)
    size = tl.load(sizes + layer)
    w_at = _address(columns, 0, layer, layers)
    g_at = _address(columns, 1, layer, layers)
    every_at = w_at | g_at
    moments_at = ()
    for i in tl.static_range(moments):
        moment_at = _address(columns, 2 + i, layer, layers)
        every_at = every_at | moment_at
        moments_at = moments_at + (moment_at,)
    keeps: tl.constexpr = measured is None
    d_from = directions
    if does == "apply" or keeps:
        d_from = directions + tl.multiple_of(tl.load(places + layer), 16)
    rate = _number(factors[0], layer, kinds[0])
    of_layer = ()
    for i in tl.static_range(numbers):
        of_layer = of_layer + (_number(factors[i + 1], layer, kinds[i + 1]),)
    is_narrow = ((offset + chunk_size > size) | ((every_at & 15) != 0)).to(tl.int32)
    w_squares = tl.zeros([block], tl.float64)
    d_squares = tl.zeros([block], tl.float64)
    for has_mask in tl.static_range(2):
        if is_narrow == has_mask:
            w_from = _pointer_to(w_at, dtype, has_mask)
            g_from = _pointer_to(g_at, dtype, has_mask)
            moments_from = ()
            for i in tl.static_range(moments):
                moments_from = moments_from + (_pointer_to(moments_at[i], tl.float32, has_mask),)
            for start in range(0, chunk_size, block):
                at = offset + start + tl.arange(0, block)
                mask = at < size
                w = _load(w_from + at, mask, has_mask)
                if h.decoupled_weight_decay:
                    w = w * (1 - tl.load(lr) * weight_decay)
                if does == "apply":
                    d = _load(d_from + at, mask, has_mask)
                else:
                    g = _load(g_from + at, mask, has_mask)
                    if h.maximize:
                        g = -g
                    if has_scale:
                        g = g * tl.load(gradient_scale)
                    decaying = 0.0
                    if decays:
                        decaying = w
                    if does == "measure" and not keeps:
                        d = measured(decaying, g, h)
                    else:
                        before = ()
                        for i in tl.static_range(moments):
                            before = before + (_load(moments_from[i] + at, mask, has_mask),)
                        for i in tl.static_range(absent):
                            before = before + (0.0,)
                        step = direction(decaying, g, *before, *of_layer, h)
                        d = step[0]
                        for i in tl.static_range(moments):
                            _store(moments_from[i] + at, step[i + 1], mask, has_mask)
                        if does == "measure":
                            _store(d_from + at, d, mask, has_mask)
                if does == "measure":
                    if has_mask:
                        d = tl.where(mask, d, 0.0)  # 0 / 0, where eps is 0
                    w_squares += _square(w)
                    d_squares += _square(d)
                else:
                    _store(w_from + at, w - rate * d, mask, has_mask)
    if does == "measure":
        tl.store(sums + chunk, tl.sum(w_squares, axis=0))
        tl.store(sums + chunks + chunk, tl.sum(d_squares, axis=0))


@triton.jit
def gather(columns, column, numbers, layers, block: tl.constexpr):
    """Put the numbers of all layers, which lie each in a tensor of its own, next to each other."""
    layer = tl.program_id(0) * block + tl.arange(0, block)
    address = tl.load(columns + column * layers + layer, mask=layer < layers, other=0)
    number = tl.load(address.to(tl.pointer_type(tl.float32)), mask=layer < layers, other=0.0)
    tl.store(numbers + layer, number, mask=layer < layers)


@triton.jit
def norms(sums, norms, first_chunk, layers, chunks, rounds: tl.constexpr, chunks_at_once: tl.constexpr):
    """Add up the squares of the chunks of each layer."""
    layer = tl.program_id(0)
    row = tl.program_id(1)
    end = tl.load(first_chunk + layer + 1)
    total = tl.zeros([chunks_at_once], tl.float64)
    begin = tl.load(first_chunk + layer)
    for number in range(0, rounds):
        chunk = begin + number * chunks_at_once + tl.arange(0, chunks_at_once)
        total += tl.load(sums + row * chunks + chunk, mask=chunk < end, other=0.0)
    tl.store(norms + row * layers + layer, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))
