"""Write the time (Unix, s) before each line of standard input; a carriage return ends a line, too."""
import os, sys, time
rest = b""
while chunk := os.read(0, 1 << 16):
    *lines, rest = (rest + chunk.replace(b"\r", b"\n")).split(b"\n")
    for l in lines:
        if l.strip():
            sys.stdout.write("%.2f %s\n" % (time.time(), l.decode("utf-8", "replace")))
    sys.stdout.flush()
if rest.strip():
    sys.stdout.write("%.2f %s\n" % (time.time(), rest.decode("utf-8", "replace")))
