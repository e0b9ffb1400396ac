"""The parts of the report: what runs wrote (runs), pictures of it (figures, maps), the page."""
