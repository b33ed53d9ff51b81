"""What is known of architectures beyond names: where the text model's blocks lie, and how experts are stored."""
