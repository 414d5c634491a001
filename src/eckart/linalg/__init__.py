"""The mathematics: tensors in, tensors out. Knows no files, no names on disk, no screens."""
