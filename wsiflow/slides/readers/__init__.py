"""What reads the pixels of slides: one file for each library, and the table of them.

Every reader follows the protocol of `wsiflow.slides.readers.reader` and stands in `wsiflow.slides.readers.formats`. To
add one: a file, and a line in that table.
"""
