"""Shows a schedule: as text, as a picture, and as a page on which one steps through it.

`text` needs NumPy only, `picture` needs matplotlib, and what `page` returns needs a browser, but no network.
"""

from mpicoll.draw.figure import picture
from mpicoll.draw.table import text
from mpicoll.draw.webpage import page

__all__ = ["page", "picture", "text"]
