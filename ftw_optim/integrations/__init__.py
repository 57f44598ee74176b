"""At home in other libraries; each module needs the extra it is named after, and nothing here is imported by itself."""
