from ismdata.readers.speakers import played as played
