"""What people read: sections of Markdown reports, rendered from templates."""
