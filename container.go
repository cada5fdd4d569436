package main

// What is different in a container: the host sets the kernel's limits, and the key may be
// gone with the container.

import (
	"io/fs"
	"path"
	"regexp"
	"strings"
)

// inContainer reports whether this process runs in a container, where root is the file
// system at "/". It does not recognise every kind.
func inContainer(root fs.FS) bool { return hasAny(root, append(appMarks, "run/systemd/container")...) }

// appMarks are the files that Docker and Podman make in a container for one program. What
// such a container writes outside its volumes is deleted with it.
var appMarks = []string{".dockerenv", "run/.containerenv"}

func hasAny(root fs.FS, names ...string) bool {
	for _, name := range names {
		if _, err := fs.Stat(root, name); err == nil {
			return true
		}
	}
	return false
}

// unnamedVolume matches the directory of a volume that Docker or Podman made without being
// asked for it. The next container gets another.
var unnamedVolume = regexp.MustCompile(`/volumes/[0-9a-f]{64}/_data$`)

// endsWithContainer reports whether files in dir, an absolute path, are lost with the
// container in which this process runs. root is the file system at "/".
// https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
func endsWithContainer(root fs.FS, dir string) bool {
	mounts, err := fs.ReadFile(root, "proc/self/mountinfo")
	if err != nil || !hasAny(root, appMarks...) {
		return false
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	longest, lost := "", false
	for line := range strings.Lines(string(mounts)) {
		// ID, parent, device, directory of the mounted file system, where it is mounted,
		// options, and behind a lone hyphen its type.
		front, back, _ := strings.Cut(line, " - ")
		fields, kind := strings.Fields(front), strings.Fields(back)
		if len(fields) < 5 || len(kind) < 1 {
			continue
		}
		from, at := unescape.Replace(fields[3]), path.Clean(unescape.Replace(fields[4]))
		if at != "/" && dir != at && !strings.HasPrefix(dir, at+"/") || len(at) < len(longest) {
			continue
		}
		longest, lost = at, at == "/" || kind[0] == "tmpfs" || unnamedVolume.MatchString(from)
	}
	return lost
}
