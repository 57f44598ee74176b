"""At home in training frameworks; each module needs the extra it is named after."""
