"""The bundled manifestos, plain Markdown."""
