"""Letters that look like Latin ones, digits that stand for letters, typographic signs. Tables only.

What NFKC folds by itself (full-width, bold, italic, circled, superscript letters) and accents are not in the tables.
The pairs are chosen by eye after the idea of Unicode Technical Standard 39 (confusables), and are far from all of them.
"""

from __future__ import annotations

from types import MappingProxyType

_PAIRS = (
    # Cyrillic, small and capital
    ("авегіјкмнпорсԁтуүхһԛԝѕьӏя", "aberijkmhnopcdtyyxhqwsblr"),
    ("АВЕІЈКМНОРСТУҮХԚԜЅӀҺЯ", "ABEIJKMHOPCTYYXQWSIHR"),
    # Greek, small and capital
    ("αβγεζηικνορσςτυχωϲϳ", "abyeznikvopostuxwcj"),
    ("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹͿ", "ABEZHIKMNOPTYXCJ"),
    # Armenian
    ("աքզհյոստցօԼՏՍՕ", "wqghjnuwgoLSUO"),
    # Cherokee capitals
    ("ᎪᏴᏟᎠᎬᏀᎻᎫᏦᏞᎷᏃᏢᏒᏚᎢᏙᎳ", "ABCDEGHJKLMZPRSTVW"),
    # Latin with strokes and hooks, and letters of phonetic alphabets
    ("łøđħŧıȷɑɓƅɗɖɛəɡɠɦɨɪɩƙɭɱɲŋɔɵƿʀɾʂƭʉʋʍɣʏʐ", "lodhtijabbddeegghiiiklmnnooprrstuvwyyz"),
    ("ʟɴʜɢʙᴀᴄᴅᴇᴊᴋᴍᴏᴘᴛᴜᴠᴡᴢꜱꜰ", "lnhgbacdejkmoptuvwzsf"),
    ("ŁØĐĦŦƁƊƐƓƗƘƝƠƤƬƲƳƵ", "LODHTBDEGIKNOPTVYZ"),
)  # fmt: skip

# enclosed letters that NFKC leaves alone: each block is A to Z in order
_BLOCKS = (0x1F130, 0x1F150, 0x1F170, 0x1F1E6)


def _letters() -> dict[int, str]:
    table = {ord(letter): latin for letters, latins in _PAIRS for letter, latin in zip(letters, latins, strict=True)}
    return table | {start + i: chr(ord("A") + i) for start in _BLOCKS for i in range(26)}


LOOKALIKES = MappingProxyType(_letters())

# typographic signs that NFKC leaves alone
SIGNS = MappingProxyType(dict.fromkeys("‘’‛ʼ′", "'") | dict.fromkeys("“”„‟″", '"') | dict.fromkeys("‐‑‒–—―−", "-"))

# "!" and "|" are left out: they stand at the ends of words far more often than inside of them
LEET = MappingProxyType({ord(sign): letter for sign, letter in zip("013457@$8", "oieastasb", strict=True)})
