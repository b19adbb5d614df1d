"""What a training run needs beside a method: its flags, its folder, its loop."""
