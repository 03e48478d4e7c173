"""Chess diagrams of positions that can arise in play, and a judge of every square and of the rules (VSM notes, 4.3).

In: a size (8, 16 or 32 pixels a square), which plies, and a PGN file if not random play. Out: RGB images with White at
the bottom, and a judge that reads one of 13 tiles in each square and then asks whether either side may be to move.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property

import chess
import chess.pgn
import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.oracles.corruptions import Corruption, noise
from fieldsmith.errors import InputError
from fieldsmith.pictures import pixels
from fieldsmith.worlds.judged import (
    GRAIN,
    UNREADABLE,
    Verdicts,
    generator_of,
    nearest,
    place,
    readable,
    residual,
)

LIGHT, DARK = "#ffce9e", "#d18b47"
CLASSES = ".PNBRQKpnbrqk"  # what a square can hold; the index is its class
EMPTY = 0
SIZES = (64, 128, 256)
PER_GAME = 8  # positions taken of one random game
DEFECT = 0.2  # largest RMS distance from the tile in a window; noise of 0.04 reaches 0.09
LEAN = 0.2  # how far a square may lie on the way to another tile: a blend lies at 0.5, a faint ghost at 0.25
MOST_MALFORMED = 32  # squares; beyond, the image is no board
BATCH = 32  # images judged at once: few enough that their pixels stay in fast memory


class ChessWorld:
    """Positions after plies[0] to plies[1] half-moves, each with `held_out_share` chance never shown in training."""

    name = "chess"
    channels = 3
    support = None

    def __init__(
        self,
        size: int = 256,
        plies: tuple[int, int] = (6, 90),
        pgn: str | pathlib.Path | None = None,
        held_out_share: float = 0.1,
    ):
        if size not in SIZES:
            raise InputError(f"size={size}: chess boards are drawn and judged at 64, 128 or 256 pixels")
        if not 0 <= plies[0] <= plies[1]:
            raise InputError(f"plies={plies}: give the fewest and the most half-moves, such as (6, 90)")
        if not 0 <= held_out_share < 1:
            raise InputError(f"held_out_share={held_out_share}: give a share from 0 to below 1")
        if pgn is not None and not pathlib.Path(pgn).is_file():
            raise InputError(f"pgn='{pgn}' is no file; name one with games, or leave it out for random play")
        self.size, self.plies, self.held_out_share = size, plies, held_out_share
        self.pgn = None if pgn is None else pathlib.Path(pgn)

    # drawing

    @cached_property
    def tiles(self) -> Tensor:
        """(light or dark, 13 classes, 3, side, side)"""
        return torch.stack(
            [torch.stack([_tile(piece, ground, self.size // 8) for piece in CLASSES]) for ground in (LIGHT, DARK)]
        )

    def render(self, placements: Tensor) -> Tensor:
        """Images of classes (n, 8 ranks from Black's, 8 files)."""
        return _assemble(self.tiles[_colours(), placements])

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        return self.render(self.positions(n, seed, held_out))

    def positions(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        """Classes of n positions, (n, 8, 8). Raises InputError where the PGN file or the share leaves none."""
        if held_out and not self.held_out_share:
            raise InputError("held_out=True, but no position of chess is held out; make the world with held_out_share=")
        source = random.Random(f"{seed} {held_out}")
        found: list[str] = []
        if self.pgn is not None:
            pool = self._from_pgn[held_out]
            if not pool:
                raise InputError(
                    f"pgn='{self.pgn}' has no {'held-out ' if held_out else ''}positions after {self.plies[0]} to "
                    f"{self.plies[1]} plies; give more games or other plies"
                )
            found = source.choices(pool, k=n)
        while len(found) < n:
            fens = [fen for fen in _walk(source, *self.plies) if self.novel(fen) == held_out]
            found += source.sample(fens, min(PER_GAME, len(fens)))
        source.shuffle(found)
        return torch.stack([classes(fen) for fen in found[:n]]) if n else torch.zeros(0, 8, 8, dtype=torch.long)

    @cached_property
    def _from_pgn(self) -> tuple[list[str], list[str]]:
        """Placements for training and held out, in the order of the file."""
        assert self.pgn is not None
        found: dict[str, None] = {}
        with self.pgn.open(encoding="utf-8", errors="replace") as file:
            while game := chess.pgn.read_game(file):
                board = game.board()
                for ply, move in enumerate(game.mainline_moves(), 1):
                    board.push(move)
                    if self.plies[0] <= ply <= self.plies[1]:
                        found[board.board_fen()] = None
        return [fen for fen in found if not self.novel(fen)], [fen for fen in found if self.novel(fen)]

    def novel(self, content: Hashable) -> bool:
        """Whether a placement is held out, by its hash; which others `sample` has drawn so far is not tracked."""
        return place(str(content)) < self.held_out_share

    # judging

    def judge(self, images: Tensor) -> Verdicts:
        """Each square one of the 13 tiles, and the position valid with White or with Black to move."""
        images, finite = readable(images, self)
        parts = [self._read(part) for part in images.split(BATCH)]
        placements, malformed = (torch.cat(part) for part in zip(*parts, strict=True))
        reasons: list[tuple[str, ...]] = []
        contents: list[str | None] = []
        clear = finite.clone()
        for i in range(len(images)):
            squares = malformed[i].nonzero().tolist()
            if not finite[i] or len(squares) > MOST_MALFORMED:
                clear[i] = False
                said: tuple[str, ...] = (UNREADABLE,)
            else:
                said = tuple(f"malformed square {'abcdefgh'[column]}{8 - row}" for row, column in squares)
                said += faults(placements[i])
            reasons.append(said)
            contents.append(None if said else fen_of(placements[i]))
        valid = torch.tensor([not said for said in reasons], dtype=torch.bool)
        return Verdicts(valid, clear, tuple(reasons), tuple(contents))

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest tile of each square and whether the square is malformed, both (n, 8, 8)."""
        n, side, colours = len(images), self.size // 8, _colours()
        squares = images.reshape(n, 3, 8, side, 8, side).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (n, 8, 8, d)
        placements = torch.empty(n, 8, 8, dtype=torch.long)
        leans = torch.empty(n, 8, 8)
        for colour in (0, 1):
            here = colours == colour
            placements[:, here], leans[:, here] = nearest(squares[:, here], self.tiles[colour].flatten(1))
        drawn = self.render(placements)
        off = residual(images, drawn, side // 8 * 2 + 1)
        worst = torch.nn.functional.max_pool2d(off[:, None], side)[:, 0]
        grain = torch.nn.functional.avg_pool2d((images - drawn).square().mean(1, keepdim=True), side)[:, 0].sqrt()
        return placements, (worst > DEFECT) | (grain > GRAIN) | (leans > LEAN)

    # corruptions

    @property
    def corruptions(self) -> Mapping[str, Corruption]:
        return {
            "blended squares": lambda n, seed: self._squares(n, seed, lambda a, b, _: (a + b) / 2),
            "chimera squares": lambda n, seed: self._squares(n, seed, _chimera),
            "scrambled squares": lambda n, seed: self._squares(n, seed, lambda a, _, order: _shuffled(a, order)),
            "faint ghosts": lambda n, seed: self._squares(n, seed, lambda a, b, _: 0.75 * a + 0.25 * b, empty=True),
            "missing king": lambda n, seed: self._boards(n, seed, _without_king),
            "two kings": lambda n, seed: self._boards(n, seed, _second_king),
            "nine pawns": lambda n, seed: self._boards(n, seed, _nine_pawns),
            "pawn on the back rank": lambda n, seed: self._boards(n, seed, _pawn_on_back_rank),
            "both sides in check": lambda n, seed: self._boards(n, seed, _both_in_check),
            "noise": noise(self),
        }

    def _squares(
        self, n: int, seed: int, mix: Callable[[Tensor, Tensor, Tensor], Tensor], empty: bool = False
    ) -> Tensor:
        """Five squares of each board, with pieces or empty, become mix(tile, another piece's tile, random order)."""
        generator, side = generator_of(seed), self.size // 8
        placements = self.positions(n, seed).flatten(1)
        colours = _colours().flatten().expand(n, 64)
        tiles = self.tiles[colours, placements]  # (n, 64, 3, side, side)
        chance = torch.rand(n, 64, generator=generator) + ((placements == EMPTY) == empty)
        rows, chosen = torch.arange(n)[:, None], chance.topk(5, dim=1).indices
        old = placements[rows, chosen]
        step = torch.randint(1, 12, (n, 5), generator=generator)
        new = torch.where(old == EMPTY, step, (old - 1 + step) % 12 + 1)
        order = torch.rand(n, 5, 1, side * side, generator=generator).argsort(-1)
        other = self.tiles[colours[rows, chosen], new]
        tiles[rows, chosen] = mix(tiles[rows, chosen], other, order)
        return _assemble(tiles.unflatten(1, (8, 8)))

    def _boards(self, n: int, seed: int, corrupt: Callable[[chess.Board, random.Random], None]) -> Tensor:
        """Positions of play that one change of pieces makes impossible."""
        source, boards = random.Random(f"{seed} corrupt"), []
        for placement in self.positions(n, seed):
            board = chess.Board(None)
            board.set_board_fen(fen_of(placement))
            corrupt(board, source)
            boards.append(classes(board.board_fen()))
        return self.render(torch.stack(boards))


def classes(fen: str) -> Tensor:
    """The class of each square of a FEN placement, (8, 8) from Black's rank."""
    rows = "".join("." * int(mark) if mark.isdigit() else mark for mark in fen if mark != "/")
    return torch.tensor([CLASSES.index(mark) for mark in rows]).reshape(8, 8)


def fen_of(placement: Tensor) -> str:
    """The FEN placement of classes (8, 8)."""
    rows = []
    for row in placement.tolist():
        text, gap = "", 0
        for index in row:
            if index == EMPTY:
                gap += 1
            else:
                text, gap = text + (str(gap) if gap else "") + CLASSES[index], 0
        rows.append(text + (str(gap) if gap else ""))
    return "/".join(rows)


def faults(placement: Tensor) -> tuple[str, ...]:
    """Why neither side can be to move, without castling and en passant; () where one can."""
    board = chess.Board(None)
    board.set_board_fen(fen_of(placement))
    flags = []
    for turn in (chess.WHITE, chess.BLACK):
        board.turn = turn
        flags.append(board.status())
        if not flags[-1]:
            return ()
    shared = flags[0] & flags[1] or flags[0] | flags[1]
    return tuple(str(flag.name).lower().replace("_", " ") for flag in chess.Status if flag & shared)


def _walk(source: random.Random, first: int, last: int) -> Iterator[str]:
    """The placements of one game of uniformly random legal moves, after `first` to `last` plies."""
    board = chess.Board()
    for ply in range(last + 1):
        if ply >= first:
            yield board.board_fen()
        moves = list(board.generate_pseudo_legal_moves())
        while moves:  # uniform over the legal ones, most of which need not be checked
            at = source.randrange(len(moves))
            move, moves[at] = moves[at], moves[-1]
            moves.pop()
            if board.is_legal(move):
                board.push(move)
                break
        else:
            return


def _colours() -> Tensor:
    """0 on light squares and 1 on dark ones, (8, 8)."""
    return (torch.arange(8)[:, None] + torch.arange(8)) % 2


def _assemble(tiles: Tensor) -> Tensor:
    """(n, 8, 8, 3, side, side) to (n, 3, 8 side, 8 side)."""
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _tile(piece: str, ground: str, side: int) -> Tensor:
    """One square, drawn at 8 times its side; smaller squares have larger and bolder pieces."""
    scale = 8
    image = Image.new("RGB", (side * scale, side * scale), ground)
    if piece != ".":
        font_file = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        share, outlined, bold = {8: (1.2, 1, 3), 16: (1.1, 1, 2), 32: (1.0, 0, 0)}[side]
        font = ImageFont.truetype(str(font_file), round(side * scale * share))
        at = "kqrbnp".index(piece.lower())
        solid, outline = chr(0x265A + at), chr(0x2654 + at)
        draw = ImageDraw.Draw(image)
        left, top, right, bottom = draw.textbbox((0, 0), solid, font)
        corner = (side * scale / 2 - (left + right) / 2, side * scale / 2 - (top + bottom) / 2)
        if piece.isupper():
            draw.text(corner, solid, "white", font)
            draw.text(corner, outline, "black", font, stroke_width=outlined, stroke_fill="black")
        else:
            draw.text(corner, solid, "black", font, stroke_width=bold, stroke_fill="black")
    return pixels(image.resize((side, side), Image.Resampling.LANCZOS))


def _chimera(a: Tensor, b: Tensor, order: Tensor) -> Tensor:
    half = a.shape[-2] // 2
    return torch.cat((a[..., :half, :], b[..., half:, :]), -2)


def _shuffled(a: Tensor, order: Tensor) -> Tensor:
    return a.flatten(-2).gather(-1, order.expand(*a.shape[:-2], -1)).reshape(a.shape)


def _empty(board: chess.Board, ranks: range = range(8)) -> list[int]:
    return [s for s in chess.SQUARES if board.piece_type_at(s) is None and chess.square_rank(s) in ranks]


def _without_king(board: chess.Board, source: random.Random) -> None:
    king = board.king(source.random() < 0.5)
    assert king is not None
    board.remove_piece_at(king)


def _second_king(board: chess.Board, source: random.Random) -> None:
    board.set_piece_at(source.choice(_empty(board)), chess.Piece(chess.KING, source.random() < 0.5))


def _nine_pawns(board: chess.Board, source: random.Random) -> None:
    pawn = chess.Piece(chess.PAWN, source.random() < 0.5)
    missing = 9 - len(board.pieces(chess.PAWN, pawn.color))
    for square in source.sample(_empty(board, range(1, 7)), missing):
        board.set_piece_at(square, pawn)


def _pawn_on_back_rank(board: chess.Board, source: random.Random) -> None:
    kings = (board.king(chess.WHITE), board.king(chess.BLACK))
    ends = [s for s in chess.SQUARES if chess.square_rank(s) in (0, 7) and s not in kings]
    board.set_piece_at(source.choice(ends), chess.Piece(chess.PAWN, source.random() < 0.5))


def _both_in_check(board: chess.Board, source: random.Random) -> None:
    """A knight at each king: no piece can stand between."""
    kings = (board.king(chess.WHITE), board.king(chess.BLACK))
    taken = {square for square in kings if square is not None}
    for colour, king in zip((chess.WHITE, chess.BLACK), kings, strict=True):
        assert king is not None
        square = source.choice(sorted(set(chess.SquareSet(chess.BB_KNIGHT_ATTACKS[king])) - taken))
        board.set_piece_at(square, chess.Piece(chess.KNIGHT, not colour))
        taken.add(square)
