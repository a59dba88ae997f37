"""The tiles of the kernels: allowed, fitting, and chosen by the rows of one table."""

from __future__ import annotations

import pytest

from fusedres.kernels import tiles
from fusedres.kernels.tiles import Arch, ConvConfig, ConvSize

H100 = Arch("sm_90", 227 * 1024, 32)
AMD = 64 * 1024  # bytes of shared memory
ARCHITECTURES = (
    *(tiles.DEFAULT_ARCH, H100, Arch("sm_100", 227 * 1024, 32), Arch("sm_103", 227 * 1024, 32)),
    *(Arch("sm_120", 99 * 1024, 32), Arch("gfx90a", AMD, 64), Arch("gfx942", AMD, 64), Arch("gfx1100", AMD, 32)),
)
SIZES = [
    ConvSize(rows, channels, outputs, taps, itemsize, pending)
    for rows in (10, 10**4, 10**6)
    for channels, outputs in ((3, 64), (64, 256), (600, 12), (1024, 1024))
    for taps in (1, 9)
    for itemsize in (2, 4)
    for pending in (False, True)
]


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.family)
@pytest.mark.parametrize("kernel", ["forward", "dgrad", "wgrad"])
def test_every_tile_is_allowed_and_fits(kernel, arch):
    for size in SIZES:
        default = tiles.conv_config(kernel, size, arch)
        for tile in (default, *tiles.conv_candidates(kernel, size, arch)):
            assert tiles.check(kernel, size.taps, arch, tile) is tile
            maps = 2 if size.pending and kernel != "forward" else 1
            smaller = min(tile.BLOCK_M, tile.BLOCK_N)
            step = (tile.BLOCK_M + tile.BLOCK_N + (maps - 1) * smaller) * tile.BLOCK_K * size.itemsize
            assert step * (tile.num_stages - (arch.warp == 64)) <= arch.shared


@pytest.mark.parametrize("kernel", ["forward", "dgrad"])
def test_several_taps_have_four_warps_at_most(kernel):
    """By default, among the candidates, and for a tile that is given."""
    for size in (s for s in SIZES if s.taps > 1):
        for tile in (tiles.conv_config(kernel, size, H100), *tiles.conv_candidates(kernel, size, H100)):
            assert tile.num_warps <= 4
    eight = ConvConfig(128, 64, 64, 8, 3)
    assert tiles.check(kernel, 1, H100, eight) is eight and tiles.check("wgrad", 9, H100, eight) is eight
    with pytest.raises(ValueError, match="4 warps at most"):
        tiles.check(kernel, 9, H100, eight)


@pytest.mark.parametrize("kernel", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.family)
def test_programs_run_in_pairs_where_two_fit(kernel, arch):
    """In 16 bits, by half of a multiprocessor's registers: gradients of eight warps on sm_80 and sm_90, forwards of one tap and four warps
    on sm_120; nothing else is bounded."""
    tile_of = [(size, tiles.conv_config(kernel, size, arch)) for size in SIZES]
    assert {tile.num_warps for _, tile in tile_of} >= {8}
    for size, tile in tile_of:
        if kernel == "forward":
            registers = 255 if arch.family == "sm_120" and size.taps == 1 and tile.num_warps == 4 else 0
        else:
            paired = arch.family in ("sm_80", "sm_90") and tile.num_warps == 8
            registers = 128 if paired and (size.taps == 1 or arch.family == "sm_90") else 0
        assert tile.registers == (registers if size.itemsize == 2 else 0)
        if tile.registers:
            assert 2 * tile.registers * 32 * tile.num_warps <= tiles.MULTIPROCESSOR_REGISTERS
            assert tile.num_stages <= (3 if (kernel, arch.family) == ("wgrad", "sm_90") else 2)
            assert [smaller.registers for smaller in tiles.smaller(tile)[:1]] == [tile.registers] * (tile.BLOCK_N > 16)
            assert size.taps == 1 or kernel == "wgrad"


@pytest.mark.parametrize(
    "family, kernel, size, expected",
    [
        ("sm_100", "wgrad", ConvSize(1568, 128, 32, 9, 2, True), ConvConfig(128, 32, 64, 4, 2)),
        ("sm_103", "wgrad", ConvSize(1568, 128, 32, 9, 2, True), ConvConfig(128, 32, 64, 4, 2)),
        ("sm_120", "dgrad", ConvSize(6272, 1024, 2048, 4, 2, True), ConvConfig(64, 64, 64, 4, 2)),
        ("sm_120", "forward", ConvSize(6272, 512, 1024, 1, 2), ConvConfig(128, 64, 64, 4, 2, registers=255)),
        ("gfx90a", "dgrad", ConvSize(6272, 1024, 2048, 4, 2, True), ConvConfig(64, 64, 64, 4, 1)),
        ("gfx942", "dgrad", ConvSize(6272, 1024, 2048, 4, 2, True), ConvConfig(64, 64, 64, 4, 1)),
        ("gfx1100", "forward", ConvSize(100352, 96, 128, 1, 2), ConvConfig(128, 64, 32, 8, 1)),
        ("gfx1100", "wgrad", ConvSize(1568, 1024, 512, 1, 2), ConvConfig(128, 64, 64, 8, 1)),
    ],
)
def test_where_a_tile_would_spill_its_row_asks_for_less(family, kernel, size, expected):
    """Stages, a step, columns, or a bound above the compiler's own; candidates take as long a step."""
    (arch,) = (arch for arch in ARCHITECTURES if arch.family == family)
    assert tiles.conv_config(kernel, size, arch) == expected
    assert {tile.BLOCK_K for tile in tiles.conv_candidates(kernel, size, arch)} == {expected.BLOCK_K}


def test_a_row_for_a_new_gpu_is_all_it_takes(monkeypatch):
    row = tiles.Row("forward", "many", "sm_90", 64, 32, 32, 32, eight_from=2**30, max_warps=2)
    monkeypatch.setattr(tiles, "ROWS", (row, *tiles.ROWS))
    size = ConvSize(10**6, 256, 256, 9, 2)
    found = tiles.forward_config(size, H100)
    assert (found.BLOCK_M, found.BLOCK_N, found.num_warps) == (64, 32, 2)
    assert tiles.forward_config(size, tiles.DEFAULT_ARCH).BLOCK_M == 128


BAD_TILES = {
    "no power of two": (48, 16, 16, 4, 2),
    "below a matrix instruction": (64, 8, 16, 4, 2),
    "too many warps": (64, 64, 64, 32, 2),
    "no stage": (64, 64, 64, 4, 0),
    "no integer": (64, 64, 64, 4.0, 2),
}


@pytest.mark.parametrize("values", BAD_TILES.values(), ids=BAD_TILES)
def test_what_is_no_tile_is_refused(values):
    with pytest.raises(ValueError, match="no tile"):
        ConvConfig(*values)


def test_an_unknown_kernel_has_no_tiles():
    with pytest.raises(ValueError, match="forward, dgrad, wgrad, or backward of one tap"):
        tiles.row("sideways", 1, H100)
    with pytest.raises(ValueError, match="backward of one tap"):
        tiles.row("backward", 9, H100)


@pytest.mark.parametrize("arch", ARCHITECTURES[:-1], ids=lambda arch: arch.family)
def test_a_tile_of_both_gradients_holds_all_outputs_and_fits(arch):
    """In registers and in shared memory, whatever it holds; of more outputs than that, and where there are too few registers, none."""
    for outputs in (6, 64, 96, 128, 256):
        assert tiles.has_both(outputs, False, arch) and tiles.has_both(outputs, True, arch) == (outputs <= 64)
        for size in (ConvSize(10**6, c, outputs, 1, itemsize, True) for c in (5, 64, 1000) for itemsize in (2, 4)):
            default = tiles.conv_config("backward", size, arch)
            for tile in (default, *tiles.conv_candidates("backward", size, arch)):
                assert tiles.check("backward", 1, arch, tile) is tile and tile.BLOCK_K >= outputs
                assert tile.BLOCK_N * tile.BLOCK_K <= 32 * tile.num_warps * tiles.REGISTERS
                step = (2 * tile.BLOCK_K + tile.BLOCK_N) * tile.BLOCK_M * size.itemsize
                assert (tile.num_stages - 1) * step <= arch.shared
            assert default.BLOCK_N * default.BLOCK_K <= tiles.GATHERED
    assert not tiles.has_both(257, False, arch) and not tiles.has_both(64, False, ARCHITECTURES[-1])


@pytest.mark.parametrize(
    "tile, expected",
    [
        (ConvConfig(128, 64, 64, 4, 3), [ConvConfig(128, 64, 64, 4, 2), ConvConfig(128, 32, 64, 4, 2)]),
        (ConvConfig(128, 16, 64, 4, 3), [ConvConfig(128, 16, 64, 4, 2)]),
        (ConvConfig(64, 32, 16, 4, 1), [ConvConfig(64, 16, 16, 4, 1)]),
        (ConvConfig(64, 16, 16, 4, 2), []),
    ],
    ids=str,
)
def test_smaller_tiles_need_less_at_each_step(tile, expected):
    assert tiles.smaller(tile) == expected
