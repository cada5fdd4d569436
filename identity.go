package main

// The identity: one file with the ed25519 private key whose public half is the peer ID
// that clients know. The code here reads and creates that file, and never changes one that
// exists. It also makes the template of the TLS certificates that prove the key.

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// The file is a libp2p PrivateKey message, as rust-libp2p's to_protobuf_encoding
// writes it: field 1 (type) = 1 (Ed25519), field 2 (data) = 64 bytes, which are
// the 32-byte seed and the 32-byte public key.
// https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md#keys
var identityPrefix = []byte{0x08, 0x01, 0x12, 0x40}

const identitySize = 4 + ed25519.PrivateKeySize

// identity is a loaded key and what the operator should hear about its file.
type identity struct {
	key ed25519.PrivateKey

	// created says that this call made the file.
	created bool

	// mode is the file's mode, as ls shows it.
	mode fs.FileMode

	// exposed says that users other than the owner may read the file.
	exposed bool

	// owner is the user that the file belongs to, if that is neither the user of this
	// process nor root: that user can read and change the key. Else it is "".
	owner string

	// openDirOwner is the owner of the file's directory if every user can write there,
	// and so can put another key in place of this one. Else it is "".
	openDirOwner string
}

// loadOrCreateIdentity reads the key at path and, where there is no file,
// creates one. An existing file is left as it is whatever is in it. Every error
// names the path; none carries key bytes.
func loadOrCreateIdentity(path string) (identity, error) {
	id, err := loadIdentity(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return identity{}, fmt.Errorf("make key: %w", err)
	}
	err = createIdentity(path, key)
	created := err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return identity{}, err
	}
	// Read it back: if another start was first, its key is ours.
	id, err = loadIdentity(path)
	id.created = created
	return id, err
}

func loadIdentity(path string) (identity, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		if target, linkErr := os.Readlink(path); linkErr == nil {
			// Do not make a key there: the disk that holds the key may be missing.
			return identity{}, fmt.Errorf("%s is a symbolic link to %s, which does not exist", path, target)
		}
	}
	if errors.Is(err, fs.ErrPermission) {
		return identity{}, explainCreate(err, filepath.Dir(path))
	}
	if err != nil {
		return identity{}, err
	}
	if info.IsDir() {
		return identity{}, fmt.Errorf("%s is a directory, not a key file", path)
	}
	if !info.Mode().IsRegular() { // opening a pipe would wait for a writer
		return identity{}, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if uid, known := fileOwner(info); errors.Is(err, fs.ErrPermission) && known && uid != os.Geteuid() {
		me := os.Geteuid()
		return identity{}, fmt.Errorf("%w: the file belongs to %s, this process runs as %s; as root: chown %d %s", err, userName(uid), userName(me), me, path)
	}
	if err != nil {
		return identity{}, err
	}
	defer f.Close()
	// One byte more than a key shows that a file is too long, without reading it all.
	data, err := io.ReadAll(io.LimitReader(f, identitySize+1))
	if err != nil {
		return identity{}, err
	}
	key, err := decodeIdentity(data)
	if err != nil {
		return identity{}, fmt.Errorf("%s %w", path, err)
	}
	id := identity{key: key, mode: info.Mode(), owner: foreignOwner(info)}
	if runtime.GOOS != "windows" { // which has no such bits: Go derives them from the read-only flag
		id.exposed = info.Mode().Perm()&0o077 != 0
		if dir, err := os.Stat(filepath.Dir(path)); err == nil && dir.Mode().Perm()&0o002 != 0 {
			uid, _ := fileOwner(dir)
			id.openDirOwner = userName(uid)
		}
	}
	return id, nil
}

// foreignOwner names the user that a file belongs to, or returns "" if that is the user
// of this process or root, who can read every key anyway.
func foreignOwner(info fs.FileInfo) string {
	uid, known := fileOwner(info)
	if !known || uid == 0 || uid == os.Geteuid() {
		return ""
	}
	return userName(uid)
}

// userName returns a user's name and number, or the number alone if the user has no name
// here, as is usual in a container.
func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return fmt.Sprintf("%s (uid %d)", u.Username, uid)
	}
	return fmt.Sprintf("uid %d", uid)
}

// decodeIdentity returns the key in data. Its errors continue the sentence
// "FILE …".
func decodeIdentity(data []byte) (ed25519.PrivateKey, error) {
	switch {
	case len(data) == 0:
		return nil, errors.New("is empty, not a key file")
	case len(data) >= 2 && data[0] == 0x08 && data[1] != 0x01:
		// KeyType: RSA 0, Ed25519 1, Secp256k1 2, ECDSA 3.
		kinds := map[byte]string{0: "an RSA", 2: "a Secp256k1", 3: "an ECDSA"}
		kind, known := kinds[data[1]]
		if !known {
			return nil, errors.New("is not a libp2p key file")
		}
		return nil, fmt.Errorf("holds %s key, only Ed25519 is supported", kind)
	case !bytes.HasPrefix(data, identityPrefix[:min(len(data), len(identityPrefix))]):
		return nil, errors.New("is not a libp2p Ed25519 key file")
	case len(data) < identitySize:
		return nil, fmt.Errorf("is truncated: %d of %d bytes", len(data), identitySize)
	case len(data) > identitySize:
		return nil, fmt.Errorf("is longer than the %d bytes of a key", identitySize)
	}
	key := ed25519.NewKeyFromSeed(data[len(identityPrefix):][:ed25519.SeedSize])
	if !bytes.Equal(key, data[len(identityPrefix):]) {
		return nil, errors.New("is damaged: its public half does not belong to its private half")
	}
	return key, nil
}

func encodeIdentity(key ed25519.PrivateKey) []byte {
	return append(bytes.Clone(identityPrefix), key...)
}

// createIdentity writes key to path, mode 0600, whole or not at all: whatever happens
// meanwhile, afterwards path is absent or a complete key. A process that is killed in
// these milliseconds may leave the temporary file, which can be deleted. The error is
// fs.ErrExist if the file exists already.
func createIdentity(path string, key ed25519.PrivateKey) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".relay-identity-*") // mode 0600
	if err != nil {
		return explainCreate(err, dir)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(encodeIdentity(key))
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return explainCreate(err, dir)
	}

	// A link, unlike a rename, fails where another start was first.
	err = os.Link(tmp.Name(), path)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		// This file system has no hard links (FAT, some network shares). Two first
		// starts within the same microseconds could both get past this check; the
		// loser would have another peer ID until its next start.
		if _, statErr := os.Lstat(path); statErr == nil {
			return fs.ErrExist
		}
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return err
	}
	os.Remove(tmp.Name()) // the key's second name, before the sync that takes long
	return syncDir(dir)
}

// explainCreate adds to err, the reason why a key can be neither found nor made in dir,
// what to do about it.
func explainCreate(err error, dir string) error {
	if cause := (*fs.PathError)(nil); errors.As(err, &cause) {
		err = cause.Err // without the name of the temporary file
	}
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	uid := os.Geteuid()
	switch {
	case errors.Is(err, fs.ErrPermission) && uid > 0: // -1 on Windows
		return fmt.Errorf("cannot make the key in %s: %w: let %s write there, as root: chown %d %s", dir, err, userName(uid), uid, dir)
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(dir); err != nil { // /proc is there, but nothing can be made in it
			return fmt.Errorf("cannot make the key in %s: there is no such directory", dir)
		}
	}
	return fmt.Errorf("cannot make the key in %s: %w", dir, err)
}

// syncDir makes a new name in dir survive a power failure.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" { // which cannot sync a directory
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	// Some file systems cannot sync a directory, such as VirtualBox's shared folders (vboxsf
	// has no fsync for them). The key file is there all the same.
	if err := d.Sync(); !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// certificateTemplate returns what our TLS certificates say besides their key: the
// relay's, and those of the clients that check plays. A certificate is made once and is
// valid from 1975 to 4096, as the old relay's was and the deployed clients' are
// (CertificateParams::default in rcgen, which rust-libp2p uses). go-libp2p's is valid from
// an hour before it was made. So everybody would refuse a relay that started while its
// clock was ahead, until the corrected clock had caught up; and a relay whose clock is
// behind would refuse the check's clients, but not the deployed ones.
func certificateTemplate() (*x509.Certificate, error) {
	number, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: number,
		NotBefore:    time.Date(1975, time.January, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(4096, time.January, 1, 0, 0, 0, 0, time.UTC),
		// An issuer must be named (RFC 5280, 4.1.2.4), and the certificate is its own.
		Subject: pkix.Name{SerialNumber: number.String()},
	}, nil
}
