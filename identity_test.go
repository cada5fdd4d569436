package main

// The key file: that the peer ID survives, and that no file is ever damaged.

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
)

// oldKeyFile is a key file as the old relay wrote it (libp2p-identity,
// to_protobuf_encoding), with the key of the first ed25519 test vector of RFC 8032,
// section 7.1. oldPeerID is its peer ID.
var (
	oldKeyFile = unhex("08011240" +
		"9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60" +
		"d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
	oldPeerID = "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// Every client knows the relay by this ID. With another ID it is another relay.
func TestOldRelaysKeyKeepsItsPeerID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, oldKeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	id, err := loadOrCreateIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := peerIDOf(t, id.key); got != oldPeerID {
		t.Errorf("peer ID = %s, want %s", got, oldPeerID)
	}
	if id.created {
		t.Error("created = true for a file that was there")
	}
	// The old relay wrote its key with mode 0644. That works, with a warning.
	if runtime.GOOS != "windows" && !id.exposed {
		t.Error("a file that others can read is not reported")
	}
	// go-libp2p reads the same key from these bytes.
	k, err := crypto.UnmarshalPrivateKey(oldKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	if raw, _ := k.Raw(); !bytes.Equal(raw, id.key) {
		t.Error("libp2p reads another key from the same bytes")
	}
}

func TestIdentitySurvivesRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	first, err := loadOrCreateIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	if !first.created || first.exposed {
		t.Errorf("created = %v, exposed = %v, want true and false", first.created, first.exposed)
	}
	again, err := loadOrCreateIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	if !first.key.Equal(again.key) || again.created {
		t.Errorf("the second start has another key (created = %v)", again.created)
	}
	data, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(data, append([]byte{8, 1, 0x12, 0x40}, first.key...)) {
		t.Errorf("file = %x (%v), want the libp2p encoding of the key", data, err)
	}
	if info, err := os.Stat(path); runtime.GOOS != "windows" && (err != nil || info.Mode().Perm() != 0o600) {
		t.Errorf("mode = %v (%v), want 0600", info.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v (%v), want only the key", entries, err)
	}
}

// Two relays that start at once, by mistake, end with one key.
func TestStartsAtOnceEndWithOneKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	type result struct {
		id  identity
		err error
	}
	results := make(chan result)
	const starts = 16
	for range starts {
		go func() {
			id, err := loadOrCreateIdentity(path)
			results <- result{id, err}
		}()
	}
	keys, created := map[string]bool{}, 0
	for range starts {
		res := <-results
		if res.err != nil {
			t.Fatal(res.err)
		}
		keys[string(res.id.key)] = true
		if res.id.created {
			created++
		}
	}
	if len(keys) != 1 || created != 1 {
		t.Errorf("%d starts end with %d keys, and %d of them created one; want one and one", starts, len(keys), created)
	}
}

// A bad file may be the only copy of something. It stays as it is, and the operator is
// told which file is bad and why.
func TestBadKeyFileIsLeftAlone(t *testing.T) {
	damaged := bytes.Clone(oldKeyFile)
	damaged[len(damaged)-1] ^= 1
	tests := []struct {
		name string
		data []byte
		says string
	}{
		{"empty", nil, "is empty"},
		{"one byte", oldKeyFile[:1], "truncated"},
		{"truncated", oldKeyFile[:67], "truncated"},
		{"longer", append(bytes.Clone(oldKeyFile), 0), "longer than"},
		{"public half does not match", damaged, "does not belong"},
		{"RSA", unhex("080012020102"), "an RSA key"},
		{"Secp256k1", append(unhex("08021220"), make([]byte, 32)...), "a Secp256k1 key"},
		{"ECDSA", unhex("0803120130"), "an ECDSA key"},
		{"unknown type", unhex("08091200"), "not a libp2p key file"},
		{"PEM", []byte("-----BEGIN PRIVATE KEY-----\n"), "not a libp2p Ed25519 key file"},
		{"bare seed", make([]byte, 32), "not a libp2p Ed25519 key file"},
		{"huge", make([]byte, 1<<20), "not a libp2p Ed25519 key file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(path, tt.data, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := loadOrCreateIdentity(path)
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("error = %v, want one that names the file and says %q", err, tt.says)
			}
			if left, err := os.ReadFile(path); err != nil || !bytes.Equal(left, tt.data) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

func TestKeyPathThatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := loadOrCreateIdentity(dir); err == nil || !strings.Contains(err.Error(), dir+" is a directory") {
		t.Errorf("directory: error = %v, want one that says so", err)
	}
	missing := filepath.Join(dir, "no", "key")
	if _, err := loadOrCreateIdentity(missing); err == nil || !strings.Contains(err.Error(), filepath.Dir(missing)) {
		t.Errorf("missing directory: error = %v, want one that names it", err)
	}
	if runtime.GOOS != "windows" && os.Geteuid() != 0 { // root reads everything
		secret := filepath.Join(dir, "secret")
		if err := os.WriteFile(secret, oldKeyFile, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := loadOrCreateIdentity(secret); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("unreadable: error = %v, want permission denied", err)
		}
	}
}

// A directory of the host that is given to a container belongs to root. Who sees this for
// the first time is told the command that mends it.
func TestKeyDirectoryOfAnotherUserIsNamed(t *testing.T) {
	if runtime.GOOS == "windows" || os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	name, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o755, 0o700} {
		// Not below the test's own directory, which that user may not enter.
		dir, err := os.MkdirTemp("", "privstack-relay-test-*")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		// The new user can't enter the binary's directory either, but can run an open file.
		binary, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer binary.Close()
		cmd := exec.Command("setpriv", "--reuid=65532", "--clear-groups", "/proc/self/fd/3", "--port=0", "--http-port=0", "--identity="+filepath.Join(dir, "key"))
		cmd.ExtraFiles = []*os.File{binary}
		out, err := cmd.CombinedOutput()
		want := "cannot make the key in " + dir + ": permission denied: let uid 65532 write there, as root: chown 65532 " + dir + "\n"
		if err == nil || !strings.HasSuffix(string(out), want) {
			t.Errorf("mode %v: %v, %q, want %q at the end", mode, err, out, want)
		}
	}
}

// The disk with the key may not be mounted yet. A new key made in its place would be
// another relay, which no client knows.
func TestDanglingLinkIsNamed(t *testing.T) {
	dir := t.TempDir()
	path, target := filepath.Join(dir, "key"), filepath.Join(dir, "disk", "key")
	if err := os.Symlink(target, path); err != nil {
		t.Skip(err)
	}
	_, err := loadOrCreateIdentity(path)
	if want := path + " is a symbolic link to " + target + ", which does not exist"; err == nil || err.Error() != want {
		t.Errorf("error = %v, want %s", err, want)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v (%v), want the link alone", entries, err)
	}
}

// Who else can read or replace the key is told to the operator, and by name.
func TestForeignKeyFileIsNamed(t *testing.T) {
	if runtime.GOOS == "windows" || os.Geteuid() != 0 {
		t.Skip("needs root, to give files away")
	}
	const nobody, stranger = 65534, 54321 // the second has no name
	for _, tt := range []struct {
		name           string
		owner          int
		dirOwner       int
		dirMode        os.FileMode
		says, saysOfIt string
	}{
		{"ours", 0, 0, 0o755, "", ""},
		{"somebody's", nobody, 0, 0o755, "nobody (uid 65534)", ""},
		{"a container's user", stranger, 0, 0o755, "uid 54321", ""},
		{"in a sticky directory", 0, 0, 0o777 | os.ModeSticky, "", "root (uid 0)"},
		{"planted in a sticky directory", nobody, 0, 0o777 | os.ModeSticky, "nobody (uid 65534)", "root (uid 0)"},
		{"in somebody's open directory", 0, nobody, 0o777, "", "nobody (uid 65534)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "key")
			err := errors.Join(os.WriteFile(path, oldKeyFile, 0o600), os.Chown(path, tt.owner, -1),
				os.Chown(dir, tt.dirOwner, -1), os.Chmod(dir, tt.dirMode))
			if err != nil {
				t.Fatal(err)
			}
			id, err := loadOrCreateIdentity(path)
			if err != nil || id.owner != tt.says || id.openDirOwner != tt.saysOfIt {
				t.Errorf("owner = %q, openDirOwner = %q (%v), want %q and %q", id.owner, id.openDirOwner, err, tt.says, tt.saysOfIt)
			}
		})
	}

	// The same in the log.
	shared := t.TempDir()
	path := filepath.Join(shared, "key")
	if err := errors.Join(os.WriteFile(path, oldKeyFile, 0o600), os.Chown(path, nobody, -1), os.Chmod(shared, 0o777|os.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	p := start(t, "--identity="+path)
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	for msg, says := range map[string]string{
		"identity key belongs to another user":                        `owner="nobody (uid 65534)"`,
		"identity key is in a directory that every user can write to": `directory_owner="root (uid 0)"`,
	} {
		if line := p.stderr.line(msg); !strings.Contains(line, says) {
			t.Errorf("log line %q, want one that says %s", line, says)
		}
	}
}

// The first start succeeds on file systems that cannot sync a directory, such as
// VirtualBox's shared folders.
func TestDirectoryThatCannotBeSynced(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("no such directory is known here")
	}
	if err := syncDir("/proc"); err != nil {
		t.Error(err)
	}
	if err := syncDir(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("syncDir of a missing directory = %v, want %v", err, fs.ErrNotExist)
	}
}

// Whatever the file holds, there is no panic and the file does not change. A key that
// is accepted is encoded to the same bytes again.
func FuzzIdentityFile(f *testing.F) {
	f.Add(oldKeyFile)
	f.Add(oldKeyFile[:40])
	f.Add([]byte{})
	f.Add(unhex("080012020102"))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		id, err := loadOrCreateIdentity(path)
		if err == nil && !bytes.Equal(encodeIdentity(id.key), data) {
			t.Errorf("%x was read as a key that is encoded as %x", data, encodeIdentity(id.key))
		}
		if left, err := os.ReadFile(path); err != nil || !bytes.Equal(left, data) {
			t.Errorf("the file was changed (%v)", err)
		}
	})
}
